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
from typing import Callable

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
            if not failed:
                _until(lambda: not _living_groups(ranks), GRACE_SECONDS)    # a logger may still be writing its last line
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
        codes = [(rank, _exit_code(rank)) for rank in ranks]
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
        _until(lambda: all(_exit_code(rank) is not None for rank in ranks), INTERRUPT_SECONDS)
    except KeyboardInterrupt:
        return


def _terminate(ranks: list[_Rank]) -> None:
    """SIGTERM, then SIGKILL, to every process group with somebody left in it; a rank's own children are in its group.

    The group of a rank that died by itself included: its children do not die with it. Ranks are reaped only here, at the
    end: until then a dead one keeps its process id, so nobody else's group can have got the number.
    """
    _signal(ranks, signal.SIGTERM)
    _until(lambda: not _living_groups(ranks), GRACE_SECONDS)
    _signal(ranks, signal.SIGKILL)
    for rank in ranks:
        rank.process.wait()


def _exit_code(rank: _Rank) -> int | None:
    """None: running. As Popen has it (negative for a signal), but without reaping."""
    if rank.process.returncode is not None:
        return rank.process.returncode
    ended = os.waitid(os.P_PID, rank.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _living_groups(ranks: list[_Rank]) -> set[int]:
    """Process groups of ranks with a member that runs; where there is no /proc to list members, those whose rank runs."""
    groups = {rank.process.pid for rank in ranks}
    living = {rank.process.pid for rank in ranks if _exit_code(rank) is None}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = status.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):    # ended while we read
            continue
        if int(group) in groups and state not in "ZX":
            living.add(int(group))
    return living


def _until(done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not done():
        time.sleep(POLL_SECONDS)


def _signal(ranks: list[_Rank], number: int) -> None:
    for rank in ranks:
        try:
            os.killpg(rank.process.pid, number)
        except ProcessLookupError:    # the whole group is gone
            continue


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
