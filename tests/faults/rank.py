"""A rank of a stage to which RUN/fault.json does something: ``python -m tests.faults.rank RECIPE_JSON``.

    {"poisoned": {ROW: FACTOR}}          the gradient of that row of the data is multiplied, its loss too by "nan"
    {"kill": {"rank": 1, "step": 3}}     SIGKILL before that step; each fault of this kind happens once
    {"kill_worker": ...}                 SIGKILL to the processes that read its data
    {"stop": ...}                        SIGSTOP    {"sleep": ...}  sleeps inside the step    {"hold": ...}  never gives the GIL back
    {"sleep_in_restore": {"rank": 1}}    sleeps where the newest checkpoint is looked for
"""

import ctypes
import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil

from glm import rank

POISON = 7
"""A row made of nothing but this token."""


def install(recipe: dict) -> None:
    from glm import platform

    platform.activate("host")
    import numpy
    import torch

    from glm.data.read_ahead import ReadAhead
    from glm.train import loop
    from glm.train.resume import StageCheckpoints
    from glm.train.step import Trainer

    folder = Path(recipe["run_folder"])
    faults = json.loads((folder / "fault.json").read_text())
    poisoned = {int(row): float(factor) for row, factor in faults.get("poisoned", {}).items()}
    clean_rows, clean_step, clean_plan, clean_restore = ReadAhead.rows, Trainer.step, loop.plan_step, StageCheckpoints.restore

    def rows(self, first, count):
        served = clean_rows(self, first, count)
        return [marked(row, number) if number in poisoned else row for number, row in enumerate(served, first)]

    def marked(row, number):
        ids = numpy.full_like(row.token_ids, POISON)
        ids[0] = POISON + 1 + sorted(poisoned).index(number)
        return dataclasses.replace(row, token_ids=ids)

    def step(self, batches, loss, **settings):
        def poisonous(losses, batch):
            total, count, metrics = loss(losses, batch)
            for row in batch.token_ids:
                if len(row) > 1 and (row[1:] == POISON).all():
                    total = total * poisoned[sorted(poisoned)[int(row[0]) - POISON - 1]]
                    if not torch.isfinite(total):
                        metrics = metrics | {"loss": torch.stack([total.detach(), count])}
            return total, count, metrics

        return clean_step(self, batches, poisonous, **settings)

    def plan_step(recipe, progress):
        for kind in ("kill", "kill_worker", "stop", "sleep", "hold"):
            if kind in faults and progress.step + 1 == faults[kind]["step"]:
                once(kind)
        return clean_plan(recipe, progress)

    def restore(self):
        if "sleep_in_restore" in faults:
            once("sleep_in_restore")
        return clean_restore(self)

    def once(kind):
        mark = folder / f"{kind}.happened"
        if os.environ.get("RANK", "0") == str(faults[kind]["rank"]) and not mark.exists():
            mark.write_text(str(os.getpid()))
            happen(kind)

    ReadAhead.rows, Trainer.step, loop.plan_step, StageCheckpoints.restore = rows, step, plan_step, restore


def happen(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "kill_worker":
        for child in psutil.Process().children():
            if "glm.data.worker" in child.cmdline():
                child.kill()
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind.startswith("sleep"):
        time.sleep(600)
    else:
        hold()


def hold() -> None:
    """Waits in C for a lock nobody gives back, the interpreter's in hand: no signal, no other thread of Python gets a turn."""
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


if __name__ == "__main__":
    install(json.loads(Path(sys.argv[1]).read_text()))
    sys.exit(rank.run(Path(sys.argv[1])))
