from pathlib import Path

import pytest
from hypothesis import settings

from glm.checkpoint.run_folder import RunFolder
from glm.recipe.compose import load_run
from glm.tokenizer.train import train_tokenizer
from tests.runs import UNPREPARED

settings.register_profile("busy_machine", deadline=None)
settings.load_profile("busy_machine")

TINY = Path(__file__).parents[2] / "configs/glm45/tiny.yaml"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    from glm.data.conversations import problem_texts

    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    source = Path(__file__).parents[2] / "glm"
    texts = [path.read_text() for path in sorted(source.rglob("*.py"))[:40]]
    train_tokenizer([*texts, *problem_texts(500, 0)], 800, folder)
    return folder


@pytest.fixture
def run_folder(tmp_path, tokenizer_folder) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    folder.tokenizer.symlink_to(tokenizer_folder)
    return folder


@pytest.fixture(scope="session")
def tiny_stages():
    """The stages of tiny.yaml with few problems, and text that needs no prepare stage."""
    return load_run(TINY, ["data.problems=600", UNPREPARED]).stages
