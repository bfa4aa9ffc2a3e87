from pathlib import Path

import pytest
from hypothesis import settings

from glm.data.conversations import problem_texts
from glm.tokenizer import load_tokenizer, train_tokenizer

settings.register_profile("busy_machine", deadline=None)
settings.load_profile("busy_machine")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    source = Path(__file__).parents[2] / "glm"
    texts = [path.read_text() for path in sorted(source.rglob("*.py"))[:60]]
    train_tokenizer([*texts, *problem_texts(500, 0)], 1000, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)
