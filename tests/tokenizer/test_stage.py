from pathlib import Path

import pytest

from glm.errors import DataError
from glm.recipe.compose import load_run
from glm.tokenizer import load_tokenizer
from pretrain.tokenizer import main, sample_texts

TINY = Path(__file__).parents[2] / "configs/glm45/tiny.yaml"


@pytest.fixture
def recipe(tmp_path):
    overrides = ["data.problems=400", "tokenizer.sample_bytes=300000", "tokenizer.vocab_size=700", "model.vocab_size=700"]
    recipe = load_run(TINY, overrides).stages["tokenizer"]
    return recipe.model_copy(update={"run_folder": str(tmp_path / "run")})


def with_documents(recipe, path):
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"documents": str(path)})})


def test_the_stage_leaves_a_whole_tokenizer_and_nothing_else(recipe, tmp_path, capsys):
    main(recipe)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tokenizer"]
    assert len(load_tokenizer(tmp_path / "run" / "tokenizer")) == 700
    assert capsys.readouterr().out.startswith("tokenizer: 700 tokens, ")


def test_running_the_stage_again_replaces_the_tokenizer(recipe, tmp_path):
    main(recipe)
    main(recipe.model_copy(update={"tokenizer": recipe.tokenizer.model_copy(update={"vocab_size": 720})}))
    assert len(load_tokenizer(tmp_path / "run" / "tokenizer")) == 720
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tokenizer"]


def test_a_stage_that_fails_keeps_the_tokenizer_that_was_there(recipe, tmp_path):
    main(recipe)
    (tmp_path / "little").mkdir()
    (tmp_path / "little" / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="a.txt"):
        main(with_documents(recipe, tmp_path / "little"))
    assert len(load_tokenizer(tmp_path / "run" / "tokenizer")) == 700
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tokenizer"]


def test_the_sample_has_about_the_shares_of_the_mixture(recipe):
    texts = list(sample_texts(recipe.data, 300_000, seed=0))
    problems = sum(len(text) for text in texts if text.startswith("Question: "))
    assert 0.8 * 0.1 * 300_000 < problems < 1.2 * 0.1 * 300_000
