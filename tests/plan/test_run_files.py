"""Every run file on every hardware file it is meant for: what README.md says fits does, and the rest is told honestly."""

import json
from pathlib import Path

import pytest
import yaml

from glm.cli import main
from glm.errors import RecipeError
from glm.plan.memory import build_states, fits, stage_memory
from glm.recipe.check import refuse_unproved
from glm.recipe.compose import load_run
from glm.recipe.schema import ModelStageRecipe, RLRecipe

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "glm45"
FITS = {
    "355b": ("h200_512", "h200_1024", "h200_2048"), "air": ("h200_128", "h200_256", "h200_512"),
    "30b": ("h200_8",), "4b": ("h200_1", "h200_8"), "tiny": ("host",), "30m": ("host",),
}
TOO_SMALL = [("355b", "h200_8"), ("355b", "h200_1"), ("355b", "host"), ("air", "h200_8"), ("air", "h200_1"), ("air", "host"), ("4b", "host"),
             ("30b", "h200_1"), ("30b", "host")]


def trained(name: str, hardware: str) -> list[ModelStageRecipe]:
    run = load_run(CONFIGS / f"{name}.yaml", [f"hardware={hardware}"])
    return [recipe for recipe in run.stages.values() if isinstance(recipe, ModelStageRecipe)]


def verdicts(pairs: list[tuple[str, str]]) -> dict[tuple[str, str], list[bool | None]]:
    """Whether each trained stage of a run file fits a hardware file."""
    recipes = [(pair, recipe) for pair in pairs for recipe in trained(*pair)]
    found = {pair: [] for pair in pairs}
    for (pair, recipe), states in zip(recipes, build_states([recipe for _, recipe in recipes]), strict=True):
        assert len(states) == recipe.layout.pp
        found[pair].append(fits(recipe, stage_memory(recipe, states)))
    return found


def test_every_stage_fits_every_hardware_it_is_meant_for():
    own = {(name, yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["hardware"]) for name in FITS}    # tests/test_cli.py checks these
    pairs = [(name, hardware) for name, files in FITS.items() for hardware in files if (name, hardware) not in own]
    assert all(found and all(found) for found in verdicts(pairs).values())


@pytest.mark.full
def test_no_model_fits_hardware_it_is_not_meant_for_and_of_the_large_ones_not_one_stage():
    for pair, found in verdicts(TOO_SMALL).items():
        assert not all(found) and not (pair[0] in ("355b", "air") and any(found)), pair


@pytest.mark.parametrize("name, hardware", [(name, hardware) for name, files in FITS.items() for hardware in files])
def test_nothing_but_rl_s_engines_is_refused_on_hardware_a_run_file_is_meant_for(name, hardware):
    for recipe in trained(name, hardware):
        if not isinstance(recipe, RLRecipe):
            refuse_unproved(recipe)


def test_every_hardware_file_is_in_the_table_and_the_readme_has_every_pair():
    assert {hardware for files in FITS.values() for hardware in files} == {path.stem for path in (CONFIGS / "hardware").glob("*.yaml")}
    rows = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    for name, files in FITS.items():
        row = next(line for line in rows if f"{name}.yaml" in line and ("`h200_" in line or "`host`" in line))
        assert all(f"`{hardware}`" in row for hardware in files), row


def test_check_says_how_many_ranks_a_model_needs_at_least(capsys):
    assert main(["check", str(CONFIGS / "air.yaml"), "hardware=h200_8", "--json"]) == 1
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert not any(entry["fits"] for entry in memory.values())
    general = memory["pretrain_general"]
    assert general["least_ranks"] == 12 and general["suggestion"] is None    # 109B x 14 bytes over 133 GB


@pytest.fixture
def draft(tmp_path):
    """Loads the tiny run file with lines added, beside the axis files it names."""
    for axis in ("model", "stage", "hardware", "mixture"):
        (tmp_path / axis).symlink_to(CONFIGS / axis)

    def load(hardware: str, said: str, *changes: str):
        text = (CONFIGS / "tiny.yaml").read_text(encoding="utf-8") + EXCEPTIONS.format(hardware, said)
        (tmp_path / "draft.yaml").write_text(text, encoding="utf-8")
        return load_run(tmp_path / "draft.yaml", changes)

    return load


EXCEPTIONS = "with_hardware:\n  {}: {}\n"


@pytest.mark.parametrize("name, said, found", [
    ("h200_9", "{layout: {tp: 1}}", "hardware 'h200_9'"), ("host", "3", "host: 3"), ("host", "{layuot: {tp: 1}}", "unknown key `layuot`"),
    ("host", "{stages: {pretrain_generel: {}}}", "stage 'pretrain_generel'"), ("host", "{stages: {export: {tokens: 1}}}", "unknown key `tokens`"),
    ("host", "{seed: 3}", "unknown key `seed`"),
])
def test_a_mistake_in_what_holds_on_one_hardware_is_found_whatever_the_run_s(draft, name, said, found):
    with pytest.raises(RecipeError) as caught:
        draft(name, said)
    assert found in caught.value.found and "draft.yaml:" in caught.value.where


def test_what_holds_on_one_hardware_wins_over_the_stage_and_yields_to_the_command_line(draft):
    said = (
        "{layout: {ep: 1, tp: 2}, stages: {midtrain_long_context: {layout: {cp: 1}}, "
        "sft_cold_start: {layout: {tp: 1}, batch: {tokens: 2048}}}}"
    )
    run = draft("host", said, "sft_cold_start.layout.ep=2")
    assert (run.stages["pretrain_general"].layout.tp, run.stages["pretrain_general"].layout.ep) == (2, 1)
    assert (run.stages["sft_cold_start"].layout.tp, run.stages["sft_cold_start"].layout.ep) == (1, 2)
    assert run.stages["sft_cold_start"].batch.tokens == 2048 and run.stages["export"].layout.tp == 1
    assert "draft.yaml:" in run.origins["pretrain_general"]["layout.tp"]
    one_rank = ("hardware=h200_1", "layout.ep=1", "layout.tp=1", "midtrain_long_context.layout.cp=1")
    other = draft("host", said, *one_rank).stages["sft_cold_start"]
    assert other.batch.tokens == 1024, "another hardware's exceptions do not hold"
    with pytest.raises(RecipeError, match="with_hardware"):
        draft("host", said, "with_hardware.host.layout.tp=1")
