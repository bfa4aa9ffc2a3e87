import json
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings

from glm.checkpoint.run_folder import RunFolder
from glm.recipe.compose import load_run
from glm.recipe.raw import RawSource
from glm.recipe.schema import PrepareRecipe
from glm.tokenizer.train import train_tokenizer
from tests.pretrain import planted

settings.register_profile("busy_machine", deadline=None)
settings.load_profile("busy_machine")

TINY = Path(__file__).parents[2] / "configs/glm45/tiny.yaml"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer([*map(planted.essay, range(200)), *map(planted.program, range(60)), planted.GERMAN], 700, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_prepare() -> PrepareRecipe:
    return load_run(TINY).stages["prepare_pretrain"]


def recipe_on(tiny: PrepareRecipe, tokenizer: Path, run: Path, sources: dict[str, dict], **more) -> PrepareRecipe:
    """A recipe on sources of one's own in a run folder with a tokenizer."""
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "tokenizer").exists():
        RunFolder(run).tokenizer.symlink_to(tokenizer)
    given = tiny.model_dump(mode="json", by_alias=True)
    given |= {"run_folder": str(run), "sources": sources, "order": [], "semantic": None, "workers": 1, "task_bytes": 20_000, **more}
    return PrepareRecipe.model_validate(given)


@pytest.fixture
def make_recipe(tiny_prepare, tokenizer_folder):
    return partial(recipe_on, tiny_prepare, tokenizer_folder)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def source(**keys) -> dict:
    return RawSource.model_validate(keys).model_dump(mode="json")
