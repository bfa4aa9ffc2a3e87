"""The host platform's stand-ins: each still needed, none beyond megatron's own modules."""

import importlib
import subprocess
import sys

import pytest
import torch

from glm import platform
from glm.errors import PlatformError
from glm.platform.host_megatron import SEAMS


def test_stand_ins_stay_inside_megatron():
    real = {name: getattr(torch, name) for name in ("zeros", "compile", "tensor")}
    platform.activate("host")
    assert all(getattr(torch, name) is value for name, value in real.items())
    schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    assert schedules.torch is not torch
    assert schedules.torch.zeros(2, device="cuda").device.type == "cpu"


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_every_seam_is_in_place(seam):
    platform.activate("host")
    assert getattr(importlib.import_module(seam.module), seam.name) is seam.replacement


def test_megatron_imported_too_early_is_refused():
    script = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import megatron.core\nfrom glm import platform\nplatform.activate('host')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0 and "megatron.core is already imported" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(PlatformError, match="no usable CUDA device"):
        platform.activate("cuda")
