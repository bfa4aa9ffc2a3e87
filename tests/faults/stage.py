"""One tiny stage of real ranks, for tests that make it fail."""

import json
import shutil
import sys
from pathlib import Path

from glm.launch.stages import run_stages
from glm.recipe.compose import load_run
from tests.runs import SMALL_TOKENIZER, TINY, UNPREPARED

STAGE = "pretrain_general"
ROWS = 8
"""Of a step: 512 tokens of 64."""
SIX_STEPS = (
    f"{STAGE}.tokens=3072", f"{STAGE}.batch={{tokens: 512, micro_batch_size: 4}}", f"{STAGE}.checkpoint={{every_steps: 2, keep: 9}}",
    f"{STAGE}.launcher={{ranks_per_node: 1, timeout_seconds: 60}}", f"{STAGE}.layout.ep=1", SMALL_TOKENIZER, UNPREPARED,
)
TWO_RANKS = (f"{STAGE}.launcher.ranks_per_node=2", f"{STAGE}.layout.ep=2")


def run(folder: Path, *changes: str, faults: dict | None = None) -> list[str]:
    """Tokenizer and six steps in ``folder``, continuing what is there; returns what the launcher said. Raises as `glm run` does."""
    last = {change.split("=")[0]: change for change in (*SIX_STEPS, *changes)}
    said: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fault.json").write_text(json.dumps(faults or {}))
    run_stages(
        load_run(TINY, [*last.values(), f"run_folder={folder}"]), ["tokenizer", STAGE], say=said.append,
        command=lambda recipe: [sys.executable, "-W", "ignore", "-m", "tests.faults.rank", str(recipe)],
    )
    return said


def copy_of(folder: Path, name: str, up_to: int | None = None) -> Path:
    """The run again, its stage reopened; with ``up_to`` as it stood after that step (0: before the stage)."""
    copy = folder.parent / name
    shutil.copytree(folder, copy)
    if up_to == 0:
        (copy / "metrics.jsonl").unlink()
        shutil.rmtree(copy / "stages" / STAGE)
        return copy
    (copy / "stages" / STAGE / "done.json").unlink()
    for checkpoint in (copy / "stages" / STAGE / "checkpoints").glob("step_*"):
        if up_to is not None and int(checkpoint.name.removeprefix("step_")) > up_to:
            shutil.rmtree(checkpoint)
    return copy


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def numbers(folder: Path) -> dict[int, tuple]:
    """{step: what the model did there}, bit for bit."""
    names = ("train/loss", "train/mtp_loss", "train/grad_norm", "balance/bias_max", "train/stage_tokens")
    return {line["step"]: tuple(line[name] for name in names) for line in lines(folder / "metrics.jsonl")
            if line["stage"] == STAGE and "train/loss" in line}


def weights(folder: Path, step: int) -> dict[str, str]:
    """Digests of every tensor of a checkpoint, optimizer state included."""
    manifest = json.loads((folder / "stages" / STAGE / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())
    return {
        f"{name}: {label}": part["sha256"] for name, entry in manifest["files"].items() for label, part in entry.get("items", {}).items()
    }
