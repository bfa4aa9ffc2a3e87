"""Fingerprints: what makes two stages the same."""

from pathlib import Path

import pytest

from glm.errors import RecipeError
from glm.recipe.compose import fingerprint, load_recipe, load_run
from glm.recipe.mixture import load_mixture, mixture_of
from glm.recipe.saved import RESULT_UP_TO_ROUNDING, differing_keys
from glm.recipe.schema import TokenizerRecipe, TrainRecipe

CONFIGS = Path(__file__).parents[2] / "configs" / "glm45"
TINY = CONFIGS / "tiny.yaml"


def prints(*overrides: str) -> dict[str, str]:
    return load_run(TINY, list(overrides)).fingerprints()


def test_a_stage_that_went_back_too_often_may_be_given_more():
    assert prints("pretrain_general.guard={rollback_limit: 9, rollback_window: 99}") == prints()
    assert prints("pretrain_general.guard={skip_limit: 9}") != prints()


def test_logging_folders_and_checkpoint_intervals_do_not_change_a_fingerprint():
    changed = prints("logging.every_steps=5", "run_folder=/elsewhere", "checkpoint.every_steps=3", "checkpoint.keep=9", "launcher.timeout_seconds=9")
    assert changed == prints()


@pytest.mark.parametrize("override", ["seed=1", "model.init_std=0.03", "data.sources.dialogues.share=1.0"])
def test_what_changes_the_result_changes_the_fingerprint(override):
    if override.startswith("data"):
        override = "sft_cold_start.data.problems=7"
    assert prints(override)["sft_cold_start"] != prints()["sft_cold_start"]


def test_another_layout_or_machine_is_the_same_stage_up_to_rounding():
    overrides = ("layout.ep=1", "layout.tp=2", "midtrain_long_context.layout.cp=1", "launcher.threads_per_rank=2")
    assert prints(*overrides) == prints()
    old, new = (load_run(TINY, list(given)).stages["pretrain_general"] for given in ((), overrides))
    assert differing_keys(old, new) == []
    assert differing_keys(old, new, only=RESULT_UP_TO_ROUNDING) == [
        "launcher.threads_per_rank: 1 -> 2", "layout.tp: 1 -> 2", "layout.ep: 2 -> 1",
    ]


def test_what_is_no_part_of_the_result_is_no_other_layout_either():
    changed = ("launcher.timeout_seconds=9", "launcher.max_restarts=1", "launcher.grace_seconds=9")
    old, new = (load_run(TINY, list(given)).stages["pretrain_general"] for given in ((), changed))
    assert old.launcher != new.launcher and differing_keys(old, new, only=RESULT_UP_TO_ROUNDING) == []


def test_a_stage_s_fingerprint_contains_its_parents_and_the_tokenizer_s():
    before, after = prints(), prints("midtrain_reasoning.schedule.peak_lr=1e-3")
    same = [stage for stage in before if before[stage] == after[stage]]
    assert same == [
        "tokenizer", "prepare_pretrain", "pretrain_general", "pretrain_code_reasoning", "prepare_midtrain", "midtrain_repo_code",
    ]
    after = prints("tokenizer.tokenizer.sample_bytes=1M")
    assert not [stage for stage in before if before[stage] == after[stage]]
    own = [fingerprint(load_run(TINY, overrides).stages["chat"]) for overrides in ([], ["tokenizer.tokenizer.sample_bytes=1M"])]
    assert own[0] == own[1], "the recipe alone is the same"


def test_differing_keys_are_listed_with_both_values():
    old, new = (load_run(TINY, overrides).stages["pretrain_general"] for overrides in ([], ["schedule.peak_lr=1e-3", "logging.every_steps=4"]))
    assert differing_keys(old, new) == ["schedule.peak_lr: 0.01 -> 0.001"]


def test_a_recipe_file_that_is_missing_torn_or_foreign_is_told(tmp_path):
    for text, found in ((None, "no such file"), ("{", "Expecting property name"), ("{}", "no known `main`"), ('{"main": "pretrain.train"}', "`name`")):
        path = tmp_path / "recipe.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert found in caught.value.found


def test_every_mixture_loads_sums_to_one_and_is_used_by_a_stage():
    names = {path.stem for path in (CONFIGS / "mixture").glob("*.yaml")}
    used = {"plain_text"}    # of 30m.yaml
    for recipe in load_run(TINY).stages.values():
        if isinstance(recipe, (TrainRecipe, TokenizerRecipe)):
            used.add(recipe.data.mixture)
            assert mixture_of(recipe.data) == load_mixture(recipe.data.mixture)
    assert used == names
    for name in names:
        assert sum(source.share for source in load_mixture(name).sources.values()) == pytest.approx(1)
