"""The ranks of one stage as processes of this machine: started, watched, and stopped together. Imports no torch."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from glm.errors import PlatformError
from glm.platform.lifetime import PARENT_VARIABLE

POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL."""
INTERRUPT_SECONDS = 20.0
"""What ranks get to stop by themselves after Ctrl-C."""


class Interrupted(Exception):
    """The user (or the scheduler, with SIGTERM) asked to stop; the ranks are gone."""


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen
    log: Path | None
    """None: rank 0, which writes to the terminal."""


def run_ranks(command: list[str], world_size: int, folder: Path, *, stage: str, threads_per_rank: int = 1) -> None:
    """Runs ``command`` once a rank, with torchrun's variables, and returns when all have exited with 0.

    Rank 0 writes to the terminal, rank N to ``folder/rank_N.log``. Raises PlatformError naming the first rank that fails,
    after stopping the others, and Interrupted on Ctrl-C or SIGTERM. No process is left behind in either case.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks: list[_Rank] = []
    with ExitStack() as opened, _sigterm_as_interrupt():
        try:
            port = free_port()
            for number in range(world_size):
                log = folder / f"rank_{number}.log" if number else None
                out = opened.enter_context(log.open("wb")) if log else None
                environment = rank_environment(number, world_size, port, threads_per_rank)
                process = subprocess.Popen(
                    command, env=environment, stdout=out, stderr=subprocess.STDOUT if out else None, stdin=subprocess.DEVNULL,
                    process_group=0,    # Ctrl-C reaches the launcher only, which tells the ranks once
                )
                ranks.append(_Rank(number, process, log))
            failed = _wait(ranks)
        except KeyboardInterrupt:
            _interrupt(ranks)
            raise Interrupted(stage) from None
        finally:
            _terminate(ranks)
    if failed:
        raise _failure(failed, stage)


def rank_environment(rank: int, world_size: int, port: int, threads_per_rank: int) -> dict[str, str]:
    """This process's environment with what torchrun would set. Output is unbuffered, so that a log shows the last line."""
    return os.environ | {
        PARENT_VARIABLE: str(os.getpid()),
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads_per_rank), "PYTHONUNBUFFERED": "1",
    }


def rank_command(recipe_file: Path) -> list[str]:
    return [sys.executable, "-m", "glm.rank", str(recipe_file)]


def free_port() -> int:
    """A TCP port of the loopback interface nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(ranks: list[_Rank]) -> _Rank | None:
    """Until all ranks are done (none) or one has failed.

    Of several at once: the one a signal killed, then one that ended with a user's error (2): the others lost their peer.
    """
    while True:
        codes = [(rank, rank.process.poll()) for rank in ranks]
        failed = sorted((code > 0, code != 2, rank.number) for rank, code in codes if code)    # signals are negative
        if failed:
            return ranks[failed[0][2]]
        if all(code == 0 for _, code in codes):
            return None
        time.sleep(POLL_SECONDS)


def _interrupt(ranks: list[_Rank]) -> None:
    """SIGINT to all, and time to stop by themselves; a second Ctrl-C does not wait."""
    _signal(ranks, signal.SIGINT)
    try:
        _until_gone(ranks, INTERRUPT_SECONDS)
    except KeyboardInterrupt:
        return


def _terminate(ranks: list[_Rank]) -> None:
    """SIGTERM, then SIGKILL, to every process group that is left; a rank's own children are in its group."""
    if all(rank.process.poll() is not None for rank in ranks):
        return
    _signal(ranks, signal.SIGTERM)
    _until_gone(ranks, GRACE_SECONDS)
    _signal(ranks, signal.SIGKILL)
    for rank in ranks:
        rank.process.wait()


def _until_gone(ranks: list[_Rank], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(rank.process.poll() is None for rank in ranks):
        time.sleep(POLL_SECONDS)


def _signal(ranks: list[_Rank], number: int) -> None:
    for rank in ranks:
        if rank.process.poll() is None:    # not yet reaped, so the group still exists and is ours
            os.killpg(rank.process.pid, number)


@contextmanager
def _sigterm_as_interrupt():
    """A scheduler's SIGTERM takes the same way out as Ctrl-C."""
    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _failure(rank: _Rank, stage: str) -> PlatformError:
    code = rank.process.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    if -code == signal.SIGKILL:
        how += " (out of memory, if nobody killed it by hand)"
    todo = "its last words are above" if rank.log is None else f"see {rank.log}; it ends:\n{last_lines(rank.log)}"
    return PlatformError(
        f"stage {stage}, rank {rank.number}", f"it {how}; the other ranks were stopped", "every rank to end with code 0",
        f"{todo}\n            the same command continues from the newest checkpoint",
    )


def last_lines(path: Path, count: int = 15) -> str:
    """The end of a log, indented."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        end = deque(lines, maxlen=count)
    return "".join(f"            | {line.rstrip()}\n" for line in end).rstrip() or "            | (nothing)"
