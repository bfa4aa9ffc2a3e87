"""A scheduler that wants the machines back: all ranks finish the step, save, and end so that the job is queued again."""

import signal
from typing import Callable

import torch
import torch.distributed as dist

from glm.checkpoint.run_folder import RunFolder, write_json
from glm.errors import REQUEUE_CODE, StageStopped
from glm.platform import active
from glm.runtime import Runtime
from glm.train.plan import Progress

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Within ``with``: SIGTERM or SIGUSR1 to any rank, or the file RUN/stages/STAGE/stop, is a request to stop after this step."""

    def __init__(self, stage: str, folder: RunFolder, runtime: Runtime):
        self.stage, self.folder, self.is_first = stage, folder, runtime.is_first
        self._asked = False

    def __enter__(self) -> "StopRequest":
        if self.is_first:
            self.folder.requeue(self.stage).unlink(missing_ok=True)
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def obey(self, progress: Progress, save: Callable[[Progress], object]) -> None:
        """Does nothing unless some rank was asked; then all save and raise StageStopped. Collective."""
        file = self.folder.stop_request(self.stage)
        asked = torch.tensor(self._asked or self.is_first and file.exists(), dtype=torch.int32, device=active().device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if not asked.item():
            return
        save(progress)
        if self.is_first:
            write_json(self.folder.requeue(self.stage), {"step": progress.step})
            file.unlink(missing_ok=True)
        dist.barrier()
        raise StageStopped(REQUEUE_CODE, f"asked to stop: saved at step {progress.step}; the same command continues")

    def _note(self, number: int, frame) -> None:
        self._asked = True
