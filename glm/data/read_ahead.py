"""Rows read ahead by worker processes while the model computes.

Which rows they are is decided by their numbers alone, so any number of workers gives the same. A worker is a process of its own
(``python -m glm.data.worker``) with a log of its own: one that dies or hangs is named, and the stage ends.
"""

import pickle
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from glm.checkpoint.run_folder import RunFolder
from glm.data.batches import Batches
from glm.data.packing import Row
from glm.errors import DataWorkerError, UserError
from glm.recipe.schema import TrainRecipe

STARTS_WITHIN_SECONDS = 240.0
"""Added for a first answer: an interpreter starts, imports and opens the corpora, on a cold file system."""


@dataclass
class _Worker:
    number: int
    process: subprocess.Popen
    connection: Connection
    log: Path
    asked: deque[tuple[int, int]] = field(default_factory=deque)
    """(first row, count) of what it works on and what waits, in order."""
    has_answered: bool = False


class ReadAhead(Batches):
    """The batches of one rank; with ``data.workers`` 0 it reads rows when they are asked for.

    After rows first … first + count - 1 the next asked for are taken to be as many, ``stride`` times count further: the rank's part
    of the next step. Where that is wrong they are read when asked for.
    """

    def __init__(self, recipe: TrainRecipe, folder: RunFolder, rank: int = 0, stride: int = 1):
        super().__init__(recipe, folder)
        self._stride, self._patience_seconds = stride, recipe.data.worker_timeout_seconds
        self._workers = [_start(number, recipe, folder, rank) for number in range(recipe.data.workers)]
        self._ready: dict[int, Row | None] = {}
        """Rows asked for; None while they are not there."""

    def rows(self, first: int, count: int) -> list[Row]:
        """Raises DataWorkerError naming a worker that died or hangs, and what a worker raised."""
        if not self._workers:
            return super().rows(first, count)
        self._ask(first, count)
        wanted = range(first, first + count)
        self._wait_for(wanted)
        rows = [self._ready[number] for number in wanted]
        following = first + self._stride * count
        self._ready = {number: row for number, row in self._ready.items() if following <= number < following + count}
        self._ask(following, count)
        return rows

    def close(self) -> None:
        """Ends the workers; they also end with this process."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
            worker.process.wait()

    def _ask(self, first: int, count: int) -> None:
        """Shares rows not asked for yet out among the workers, in runs of neighbours."""
        missing = [number for number in range(first, first + count) if number not in self._ready]
        each = -(-len(missing) // len(self._workers))
        for start in range(0, len(missing), each or 1):
            numbers = missing[start : start + each]
            worker = min(self._workers, key=lambda worker: (len(worker.asked), worker.number))
            for run_first, run_count in _runs(numbers):
                try:
                    worker.connection.send((run_first, run_count))
                except OSError:
                    pass  # it died; whoever waits for the rows is told
                worker.asked.append((run_first, run_count))
            self._ready |= dict.fromkeys(numbers)

    def _wait_for(self, wanted: range) -> None:
        while any(self._ready[number] is None for number in wanted):
            owing = {worker.connection: worker for worker in self._workers if worker.asked}
            patience = self._patience_seconds + (0 if all(worker.has_answered for worker in owing.values()) else STARTS_WITHIN_SECONDS)
            answered = wait(list(owing), timeout=patience)
            if not answered:
                late = next(worker for worker in owing.values() if any(_overlap(range(a, a + n), wanted) for a, n in worker.asked))
                raise self._failure(late, f"no answer for {patience:g} s", "raise data.worker_timeout_seconds if storage is that slow")
            for connection in answered:
                self._receive(owing[connection])

    def _receive(self, worker: _Worker) -> None:
        try:
            rows = worker.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            code = worker.process.wait()
            died = f"it was killed by signal {-code}" if code < 0 else f"it ended with code {code}"
            raise self._failure(worker, died, "if it was killed, look for a lack of memory (dmesg)") from error
        if isinstance(rows, UserError):
            raise rows
        worker.has_answered = True
        first, count = worker.asked.popleft()
        for number, row in zip(range(first, first + count), rows, strict=True):
            if number in self._ready:  # else it is no longer wanted
                self._ready[number] = row

    def _failure(self, worker: _Worker, found: str, hint: str) -> DataWorkerError:
        first, count = worker.asked[0]
        return DataWorkerError(
            f"data worker {worker.number} of stage {self._recipe.stage}, rows {first} to {first + count - 1}", found, "the rows",
            f"read {worker.log}; {hint}; the same command continues from the last checkpoint, data.workers=0 reads without workers",
        )


def _start(number: int, recipe: TrainRecipe, folder: RunFolder, rank: int) -> _Worker:
    log = folder.data_worker_log(recipe.stage, rank, number)
    log.parent.mkdir(parents=True, exist_ok=True)
    ours, theirs = socket.socketpair()
    with log.open("wb") as out, theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "glm.data.worker", str(theirs.fileno())], pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
        )
    connection = Connection(ours.detach())
    connection.send((recipe, folder))
    return _Worker(number, process, connection, log)


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """(first, count) of the runs of neighbours."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and sum(runs[-1]) == number:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs


def _overlap(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)
