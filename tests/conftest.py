"""Before torch is imported by any test: one thread, so that sums have one order and ranks do not fight for the cores."""

import os
import sys

if "torch" in sys.modules and os.environ.get("OMP_NUM_THREADS") != "1":
    raise RuntimeError("torch was imported before tests/conftest.py could limit its threads; a pytest plug-in imports it?")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_SILENT", "true")


def pytest_addoption(parser):
    parser.addoption("--write-matrix", action="store_true", help="put the table of layouts into docs/numerics.md (with -m full tests/layout)")
