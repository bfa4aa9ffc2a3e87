"""`glm show --schedule`: the report's points at exact tokens, one object a line, and a picture."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from glm.cli import main
from glm.recipe.compose import load_run
from glm.recipe.schema import ModelStageRecipe
from glm.show.schedule import sketch

CONFIGS = Path(__file__).parents[2] / "configs" / "glm45"
LARGE, TINY = str(CONFIGS / "355b.yaml"), str(CONFIGS / "tiny.yaml")
KEYS = ["run_tokens", "stage", "lr", "batch_tokens", "sequence_length", "mtp_weight", "bias_update_rate", "rotary_base"]


def lines(capsys, *words: str) -> list[dict]:
    assert main(["show", *words, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refusal(capsys, *words: str) -> str:
    assert main(["show", *words]) == 2
    told = capsys.readouterr()
    assert told.out == "" and all(part in told.err for part in ("found:", "expected:", "to do:"))
    return told.err


# Report, sections 2.3 and 2.4: run tokens, stage, learning rate, batch, length, MTP weight, bias rate, RoPE base.
PAPER = [
    ("0", "pretrain_general", None, 16e6, 4096, 0.3, 1e-3, 10_000),
    ("250B", "pretrain_general", None, 40e6, 4096, 0.3, 1e-3, 10_000),
    ("500B", "pretrain_general", None, 64e6, 4096, 0.3, 1e-3, 10_000),
    ("14_999_999_999_999", "pretrain_general", None, 64e6, 4096, 0.3, 1e-3, 10_000),
    ("15T", "pretrain_code_reasoning", None, 64e6, 4096, 0.1, 0, 10_000),
    ("22T", "midtrain_repo_code", None, 64e6, 32_768, 0.1, 0, 10**6),
    ("22.5T", "midtrain_reasoning", None, 64e6, 32_768, 0.1, 0, 10**6),
    ("23T", "midtrain_long_context", None, 64e6, 131_072, 0.1, 0, 10**6),
    ("23.1T", "midtrain_long_context", 2.5e-5, 64e6, 131_072, 0.1, 0, 10**6),
    ("2B", "pretrain_general", 2.5e-4, 16.2e6, 4096, 0.3, 1e-3, 10_000),
]


@pytest.mark.parametrize("name", ["355b", "air"])
def test_the_report_s_points_stand_at_exact_tokens_and_an_edge_belongs_to_the_next_stage(name, capsys):
    asked = [word for point in PAPER for word in ("--at", point[0])]
    rows = lines(capsys, str(CONFIGS / f"{name}.yaml"), "--schedule", *asked)
    assert [list(row) for row in rows] == [KEYS] * len(PAPER)
    for row, (at, stage, lr, batch, *rest) in zip(rows, PAPER, strict=True):
        assert row["stage"] == stage and [row[key] for key in KEYS[4:]] == rest, at
        assert row["batch_tokens"] == pytest.approx(batch, rel=0.03) and row["batch_tokens"] % row["sequence_length"] == 0
        assert lr is None or row["lr"] == pytest.approx(lr, rel=1e-6)
    assert [row["run_tokens"] for row in rows[:3]] == [0, 250 * 10**9, 500 * 10**9]
    if name == "355b":
        assert lines(capsys, LARGE, "--at", "15T", "pretrain_general")[0]["mtp_weight"] == 0.3, "alone, the stage's end is its own"


def test_every_line_of_the_whole_schedule_has_the_same_keys_and_run_tokens_never_fall(capsys):
    rows = lines(capsys, LARGE, "--schedule")
    assert all(list(row) == KEYS for row in rows) and {row["stage"] for row in rows} >= {"pretrain_general", "sft_cold_start", "rl_reasoning"}
    tokens = [row["run_tokens"] for row in rows]
    assert tokens == sorted(tokens) and tokens[0] == 0
    assert next(row["run_tokens"] for row in rows if row["stage"] == "rl_reasoning") == 23_102 * 10**9, "after 2B of fine-tuning"


def test_a_point_beyond_the_end_is_refused_with_the_range(capsys):
    assert "0 to 23.1T" in refusal(capsys, LARGE, "--schedule", "--at", "23.2T")
    assert "0 to 15T, 23T to 23.1T" in refusal(capsys, LARGE, "--at", "16T", "pretrain_general", "midtrain_long_context")
    assert "15T, 500B or 4096" in refusal(capsys, LARGE, "--at", "many")
    assert "the run's clock" in refusal(capsys, LARGE, "--at", "1", "sft_cold_start", "rl_reasoning")
    assert "no stage that trains" in refusal(capsys, TINY, "--schedule", "chat")


def test_a_stage_with_a_clock_of_its_own_counts_from_its_beginning(capsys):
    start, warm, end = lines(capsys, LARGE, "sft_cold_start", *(f"--at={at}" for at in ("0", "60M", "2B")))
    assert start["lr"] < warm["lr"] == pytest.approx(2.5e-5, rel=1e-3) and end["lr"] == pytest.approx(2.5e-6)
    assert "0 to 2B" in refusal(capsys, LARGE, "sft_cold_start", "--at", "2_000_000_001")


def test_the_schedule_is_drawn_in_the_run_folder_or_where_one_says(tmp_path, capsys):
    assert main(["show", TINY, "--schedule", f"run_folder={tmp_path / 'run'}"]) == 0
    printed = capsys.readouterr().out
    assert "bias rate" in printed and str(tmp_path / "run" / "schedule.svg") in printed.replace("\n", "")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["schedule.svg"]
    assert ElementTree.parse(tmp_path / "run" / "schedule.svg").getroot().tag.endswith("svg")
    lines(capsys, TINY, "--schedule", "--plot", str(tmp_path / "deep" / "x.png"))
    assert (tmp_path / "deep" / "x.png").read_bytes().startswith(b"\x89PNG")
    assert main(["show", TINY, "--schedule", "--json", "--plot", str(tmp_path / "x.doc")]) == 2
    assert "a picture: .svg, .png or .pdf" in capsys.readouterr().err and not (tmp_path / "x.doc").exists()


def test_the_sketch_shows_every_schedule_and_every_stage():
    stages = {name: recipe for name, recipe in load_run(LARGE).stages.items() if isinstance(recipe, ModelStageRecipe)}
    clocked = {name: recipe for name, recipe in stages.items() if recipe.schedule.clock == "run"}
    rows = dict((line[:13].strip(), line[13:]) for line in sketch(clocked).splitlines())
    assert list(rows) == ["lr", "batch tokens", "length", "MTP weight", "bias rate", "RoPE base", "stages"]
    assert rows["MTP weight"].startswith("█" * 60) and rows["MTP weight"].endswith("▁  0.3 to 0.1")
    assert rows["stages"].count("│") == len(clocked) and rows["length"].count("█") >= 1
