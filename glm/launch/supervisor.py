"""Starts a stage again whose ranks died or hung. Imports no torch.

A user's mistake (exit code 2) is told at once, and so is an exception before the first step of a start: it is a mistake of the
program's. What is left is tried again: after ``launcher.max_restarts`` restarts in a row without a new step or checkpoint it is
told as well.
"""

import json
import time
from pathlib import Path
from typing import Callable

from glm.checkpoint.run_folder import RunFolder
from glm.errors import HANG_CODE, ROLLBACK_CODE, PlatformError
from glm.launch.local import RankFailed
from glm.recipe.schema import StageRecipe

LONGEST_WAIT_SECONDS = 300.0
_TAIL_BYTES = 1 << 18


def supervise(start: Callable[[int], None], recipe: StageRecipe, folder: RunFolder, say: Callable[[str], None],
              sleep: Callable[[float], None] = time.sleep) -> None:
    """``start(attempt)`` until it returns. Raises the last PlatformError when it is not worth trying again.

    Every restart is told with its reason and written to RUN/stages/STAGE/restarts.jsonl.
    """
    stage, limit = recipe.stage, recipe.launcher.max_restarts
    furthest, in_vain, attempt = progress(folder, stage), 0, 0
    while True:
        attempt, at_start, started = attempt + 1, progress(folder, stage), time.time()
        try:
            return start(attempt)
        except RankFailed as failed:
            reached, idle = progress(folder, stage), _idle_seconds(folder, started)
            kind, failure = _judge(failed, recipe, folder, started)
            in_vain = 0 if reached > furthest or kind == "rollback" else in_vain + 1
            furthest = max(furthest, reached)
            hopeless = kind == "mistake" or kind == "error" and reached <= _began_after(folder, stage, started, at_start)
            again = kind == "rollback" or not hopeless and 0 < limit >= in_vain
            if not hopeless and in_vain > limit > 0:
                failure = _given_up(failure, in_vain, stage)
            wait = 0.0 if kind == "rollback" else min(LONGEST_WAIT_SECONDS, 2.0**in_vain)
            record(folder, stage, {
                "kind": kind, "restarted": again, "step": reached, "idle_seconds": round(idle, 1), "wait_seconds": wait if again else 0.0,
                "reason": f"{failure.where}: {failure.found}",
            })
            if not again:
                raise failure from None
            say(f"{stage}: {failure.where}: {failure.found}\nglm run: {stage}: starts again in {wait:.0f} s, after step {reached}"
                + (f" (restart {in_vain} of {limit} without getting further)" if in_vain else ""))
            sleep(wait)


def progress(folder: RunFolder, stage: str) -> int:
    """The last step that was logged or saved."""
    names = [path.name.removeprefix("step_") for path in folder.checkpoints(stage).glob("step_*")]
    newest = max([int(name) for name in names if name.isdecimal()], default=0)
    return max([newest, *(line.get("step", 0) for line in _last_lines(folder.metrics) if line.get("stage") == stage)])


def _began_after(folder: RunFolder, stage: str, started: float, otherwise: int) -> int:
    """The step this start went on from, once it has said so (glm/metrics/goodput.py): later ones in the log are an earlier start's."""
    starts = [entry for entry in _last_lines(folder.restarts(stage)) if entry["kind"] == "start"]
    return starts[-1]["step"] if starts and starts[-1]["unix_seconds"] >= round(started, 1) else otherwise


def record(folder: RunFolder, stage: str, entry: dict) -> None:
    path = folder.restarts(stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps({"unix_seconds": round(time.time(), 1), **entry}) + "\n")


def _judge(failed: RankFailed, recipe: StageRecipe, folder: RunFolder, started: float) -> tuple[str, PlatformError]:
    """What kind of failure it was, and how it is told."""
    hung = _hang_reports(folder, recipe, started)
    if failed.code == HANG_CODE or hung:
        stood = "".join(f"\n            {line}" for line in hung)
        return "hang", PlatformError(
            f"stage {recipe.stage}", f"no progress for {recipe.launcher.timeout_seconds} s (launcher.timeout_seconds):{stood}",
            "a step within that time",
            f"the stacks of all threads are in {folder.hang(recipe.stage, 0).parent}/hang_rank_*.txt; a rank that waits for no other is the "
            "one to look at\n            the same command continues from the newest checkpoint",
        )
    if failed.code == ROLLBACK_CODE and folder.rollbacks(recipe.stage).exists():
        last = json.loads(folder.rollbacks(recipe.stage).read_text(encoding="utf-8"))[-1]
        failed.found = f"goes back from step {last['from_step']} to step {last['to_step']}: {'; '.join(last['reasons'])}"
        return "rollback", failed
    return ("mistake" if failed.code == 2 else "killed" if failed.code < 0 else "error"), failed


def _given_up(failure: PlatformError, in_vain: int, stage: str) -> PlatformError:
    return PlatformError(
        failure.where, f"{failure.found}\n            {stage} was started {in_vain} times without getting further", failure.expected,
        f"{failure.todo}\n            launcher.max_restarts says how often it is tried",
    )


def _hang_reports(folder: RunFolder, recipe: StageRecipe, started: float) -> list[str]:
    """The first lines of what the ranks of this start wrote when they had waited too long."""
    reports = [(rank, folder.hang(recipe.stage, rank)) for rank in range(recipe.world_size)]
    fresh = [(rank, path) for rank, path in reports if path.exists() and path.stat().st_size and path.stat().st_mtime >= started]
    return [_first_line(rank, path.read_text(encoding="utf-8", errors="replace").splitlines()) for rank, path in fresh]


def _first_line(rank: int, report: list[str]) -> str:
    """The watchdog's own; where faulthandler wrote instead of it, where the main thread stood, whose stack is the last."""
    if not report[0].startswith("Timeout ("):
        return report[0]
    stacks = [number for number, line in enumerate(report) if line.endswith("(most recent call first):")]
    return f"rank {rank}, holds the interpreter's lock and waits for no other rank: {' '.join(report[stacks[-1] + 1:][:1]).strip()}"


def _idle_seconds(folder: RunFolder, started: float) -> float:
    """Since the last line was logged, or since the start."""
    logged = folder.metrics.stat().st_mtime if folder.metrics.exists() else 0.0
    return time.time() - max(started, logged)


def _last_lines(path: Path) -> list[dict]:
    """Whole objects at the end of a file of JSON lines."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().split(b"\n")[1 if file.tell() > _TAIL_BYTES else 0:-1]
    return [json.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"}")]
