"""A small stage that ran to its end undisturbed, for tests that disturb copies of it."""

import os
import shutil
from pathlib import Path

import pytest

from glm import platform

platform.activate("host")

from tests.train.forked import completed, start_of  # noqa: E402 - megatron's stand-ins come first


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    """The override that names the documents of all these runs."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted(Path(os.__file__).parent.glob("*.py"))[:24]:
        shutil.copy(path, folder)
    return f"data.documents={folder}"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, text) -> Path:
    """A run with a tokenizer and nothing else."""
    folder = tmp_path_factory.mktemp("runs") / "prepared"
    completed(folder, text, stage="tokenizer")
    (folder / "data").mkdir()
    return folder


@pytest.fixture(scope="session")
def whole(prepared, text) -> Path:
    """Eight steps that nobody disturbed, and all their checkpoints."""
    folder = start_of(prepared, "whole")
    completed(folder, text, "checkpoint.keep=9")
    return folder
