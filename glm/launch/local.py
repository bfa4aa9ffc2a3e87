"""The ranks of one stage as processes of this machine: started, watched, and stopped together. Imports no torch."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from glm.errors import HANG_CODE, REQUEUE_CODE, ROLLBACK_CODE, PlatformError
from glm.launch.signals import Requeued, StopSignals
from glm.platform.lifetime import PARENT_VARIABLE

POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL."""
INTERRUPT_SECONDS = 20.0
"""What ranks get to stop by themselves after Ctrl-C."""
LEAVE_SECONDS = 10.0
"""What the others get when one rank ends with a code with which all do."""
_TOGETHER = (REQUEUE_CODE, ROLLBACK_CODE, HANG_CODE)


class Interrupted(Exception):
    """The user asked to stop; the ranks are gone."""


class RankFailed(PlatformError):
    """A rank ended in another way than with code 0. ``code``: its exit code, negative for a signal."""

    code = 1


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen
    log: Path | None
    """None: rank 0, which writes to the terminal."""


def run_ranks(command: list[str], world_size: int, folder: Path, *, stage: str, threads_per_rank: int = 1, attempt: int = 1,
              grace_seconds: float = INTERRUPT_SECONDS, stop: StopSignals | None = None) -> None:
    """Runs ``command`` once a rank, with torchrun's variables, and returns when all have exited with 0.

    Rank 0 writes to the terminal, rank N to ``folder/rank_N.log`` (``attempt`` 2 and later behind what is there). When ``stop`` is
    asked for, the ranks get SIGTERM and ``grace_seconds``. Raises RankFailed naming the first rank that fails, after stopping the
    others, Interrupted on Ctrl-C, and Requeued when they stopped for the scheduler. No process is left behind in any case.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks: list[_Rank] = []
    with ExitStack() as opened:
        stop = stop or opened.enter_context(StopSignals())
        try:
            port = free_port()
            for number in range(world_size):
                log = folder / f"rank_{number}.log" if number else None
                out = opened.enter_context(log.open("ab" if attempt > 1 else "wb")) if log else None
                environment = rank_environment(number, world_size, port, threads_per_rank)
                process = subprocess.Popen(
                    command, env=environment, stdout=out, stderr=subprocess.STDOUT if out else None, stdin=subprocess.DEVNULL,
                    process_group=0,    # Ctrl-C reaches the launcher only, which tells the ranks once
                )
                ranks.append(_Rank(number, process, log))
            codes = _wait(ranks, stop, grace_seconds)
            if codes == [0] * world_size:
                _until(lambda: not _living_groups(ranks), GRACE_SECONDS)    # a logger may still be writing its last line
        except KeyboardInterrupt:
            _interrupt(ranks)
            raise Interrupted(stage) from None
        finally:
            _terminate(ranks)
    if codes == [0] * world_size:
        return
    if stop.asked or REQUEUE_CODE in codes:
        if all(code in (0, REQUEUE_CODE, None, -signal.SIGTERM) for code in codes):
            raise Requeued(stage, saved=REQUEUE_CODE in codes)    # no rank ends so before all have saved
    # Of several at once: the one a signal killed, then one that says why all end, then one that ended with a user's error
    # (2); the others lost their peer.
    failed = min((code > 0, code not in _TOGETHER, code != 2, number) for number, code in enumerate(codes) if code)
    raise _failure(ranks[failed[-1]], codes[failed[-1]], stage)


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


def _wait(ranks: list[_Rank], stop: StopSignals, grace_seconds: float) -> list[int | None]:
    """The exit codes when all ranks are done, one has failed, or time to end together is over (None: still running)."""
    told = leaving = None
    while True:
        codes, now = [_exit_code(rank) for rank in ranks], time.monotonic()
        if None not in codes or any(code not in (None, 0, *_TOGETHER) for code in codes):
            return codes
        if leaving is None and any(code in _TOGETHER for code in codes):
            leaving = now
            _signal(ranks, signal.SIGCONT)    # a stopped rank cannot say where it stands
        if told is None and stop.asked:
            told = now
            for rank in ranks:
                os.kill(rank.process.pid, signal.SIGTERM)    # not reaped yet, so the number is its own
        if told is not None and now - told > grace_seconds or leaving is not None and now - leaving > LEAVE_SECONDS:
            return codes
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


def _failure(rank: _Rank, code: int, stage: str) -> RankFailed:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    if -code == signal.SIGKILL:
        how += " (out of memory, if nobody killed it by hand)"
    todo = "its last words are above" if rank.log is None else f"see {rank.log}; it ends:\n{last_lines(rank.log)}"
    failure = RankFailed(
        f"stage {stage}, rank {rank.number}", f"it {how}; the other ranks were stopped", "every rank to end with code 0",
        f"{todo}\n            the same command continues from the newest checkpoint",
    )
    failure.code = code
    return failure


def last_lines(path: Path, count: int = 15) -> str:
    """The end of a log, indented."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        end = deque(lines, maxlen=count)
    return "".join(f"            | {line.rstrip()}\n" for line in end).rstrip() or "            | (nothing)"
