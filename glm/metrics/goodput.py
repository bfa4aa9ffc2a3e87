"""What share of a stage's time was training, and what the rest was.

Lines of metrics.jsonl are those of the steps that survived. What is not in them stands in RUN/stages/STAGE/restarts.jsonl: a
``start`` for each time the stage's ranks came to their first step (how long that took, and what an earlier start had done that
is now done again), and why `glm run` started them again (glm/launch/supervisor.py).
"""

import json
import time
from collections import Counter
from dataclasses import dataclass

from glm.checkpoint.run_folder import RunFolder
from glm.metrics.read import as_number, read_lines

START = "start"
_PHASES = {"data": "data", "checkpoint": "checkpoints", "validation": "validation"}
"""Phases of a step (glm/metrics/phases.py) that are not training."""


@dataclass(frozen=True)
class Goodput:
    seconds: dict[str, float]
    """training, start-up, data, checkpoints, validation, repeated (done again after a kill or a rollback), hung, waiting (before a
    restart), other."""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        return self.seconds["training"] / self.total if self.total else 0.0

    @property
    def metrics(self) -> dict[str, float]:
        return {"goodput/share": round(self.share, 4)} | {
            f"goodput/{name.replace('-', '_')}_seconds": round(seconds, 2) for name, seconds in self.seconds.items()
        }

    @property
    def sentence(self) -> str:
        parts = [(name, seconds) for name, seconds in self.seconds.items() if name == "training" or seconds >= 0.05]
        return f"goodput {100 * self.share:.1f} %: " + ", ".join(f"{name} {seconds:.3g} s" for name, seconds in parts)


def goodput(lines: list[dict], restarts: list[dict]) -> Goodput:
    """``lines``: metrics of one stage, oldest first; ``restarts``: its restarts.jsonl.

    A line stands for the steps since the line before. It tells its own step's seconds, taken for those of each, and the seconds
    that phases took since that line. The data of a step is part of its seconds, a checkpoint and a validation come after them.
    """
    seconds: Counter[str] = Counter({"training": 0.0})
    before = logged = 0.0
    for line in lines:
        logged = max(logged, as_number(line.get("time_seconds")) or 0.0)
        step, took = line.get("step", 0), as_number(line.get("train/step_seconds"))
        if took is None:
            continue
        steps, before = max(0.0, step - before), step
        seconds["training"] += steps * took
        for phase, name in _PHASES.items():
            seconds[name] += as_number(line.get(f"phase/{phase}_seconds")) or 0.0
    seconds["training"] -= seconds["data"]
    seconds["other"] = max(0.0, logged - sum(seconds.values()))
    for entry in restarts:
        if entry["kind"] == START:
            seconds["start-up"] += entry["startup_seconds"]
            seconds["repeated"] += entry["repeated_seconds"]
        else:
            seconds["hung" if entry["kind"] == "hang" else "repeated"] += entry["idle_seconds"]
            seconds["waiting"] += entry["wait_seconds"]
    order = ("training", "start-up", "data", "checkpoints", "validation", "repeated", "hung", "waiting", "other")
    return Goodput({name: seconds[name] for name in order})


def of_stage(folder: RunFolder, stage: str) -> Goodput | None:
    """None for a stage that has not made a step."""
    lines = [line for line in read_lines(folder.metrics).records if line.get("stage") == stage]
    if not any("train/step_seconds" in line for line in lines):
        return None
    return goodput(lines, read_lines(folder.restarts(stage)).records)


def note_start(folder: RunFolder, stage: str, step: int, dropped: list[dict]) -> None:
    """Rank 0, about to make its first step after ``step``. ``dropped``: the lines of steps that will be done again."""
    import psutil

    again = [line for line in dropped if "train/step_seconds" in line]
    entry = {
        "kind": START, "step": step, "startup_seconds": round(time.time() - psutil.Process().create_time(), 2),
        "repeated_steps": len(again),
        "repeated_seconds": round(again[-1]["time_seconds"] - again[0]["time_seconds"] + again[0]["train/step_seconds"], 2) if again else 0.0,
    }
    path = folder.restarts(stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps({"unix_seconds": round(time.time(), 1), **entry}) + "\n")
