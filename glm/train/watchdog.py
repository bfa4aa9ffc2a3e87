"""A rank that waits too long, for another or in a step, says where every thread stands and ends. No rank waits for ever.

Every rank has one from the first moment, and all beat at the same step, so all find out at about the same time. What a thread
waits in is read from its own frames when it is too late: nothing is wrapped or counted before. On CUDA the call returns at once
and the device waits; there torch's flight recorder knows the collective (docs/operations.md).
"""

import faulthandler
import math
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from glm.errors import HANG_CODE

_TELL_SECONDS = 1.0
"""Between the report and the end: the others, which notice at the same time, get to tell theirs."""
_HELD_SECONDS = 5.0
"""How much later a thread that holds the interpreter's lock is found."""
_TENSORS = ("tensor", "output_tensor", "input_tensor", "output", "input", "tensor_list", "object_list")
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")


class Watchdog:
    """Within ``with``: ends the process with HANG_CODE when ``seconds`` pass without a ``beat``, after writing to ``report`` and stderr.

    A thread that never gives the interpreter's lock back is found by a timer of faulthandler's a little later: before the launcher,
    who sees the others end, kills this process (glm/launch/local.py: LEAVE_SECONDS).
    """

    def __init__(self, seconds: float, rank: int, report: Path):
        self.seconds, self.rank, self.report = seconds, rank, report
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._what = "the meeting of the ranks"

    def __enter__(self) -> "Watchdog":
        self.report.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.report.open("w", encoding="utf-8")
        self._watched = threading.get_ident()
        self.beat(self._what)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def beat(self, what: str, limited: bool = True) -> None:
        """Something was finished; ``what`` comes next, and may last as long as it likes unless ``limited``."""
        self._what, self._last = what, time.monotonic() if limited else math.inf
        faulthandler.cancel_dump_traceback_later()
        if limited:
            faulthandler.dump_traceback_later(self.seconds + _HELD_SECONDS, exit=True, file=self._file)

    def __exit__(self, kind, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._is_late():    # the collective's own time-out was quicker than we, or this rank was stopped and finds the others gone
            self._tell_and_end(error)
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        self.report.unlink(missing_ok=True)

    def _is_late(self) -> bool:
        return time.monotonic() - self._last > self.seconds

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.seconds / 20)):
            if self._is_late():
                self._tell_and_end()

    def _tell_and_end(self, error: BaseException | None = None) -> None:
        with self._lock:    # told once; nobody gets out again
            late = time.monotonic() - self._last
            frame = sys._current_frames()[self._watched] if error is None else _innermost(error.__traceback__)
            line = f"rank {self.rank}, {late:.0f} s in {self._what}: {whereabouts(frame)}\n"
            for file in (self._file, sys.stderr):
                file.write(line)
                if error is not None:
                    traceback.print_exception(error, file=file)
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
            os.fsync(self._file.fileno())
            time.sleep(_TELL_SECONDS)
            os._exit(HANG_CODE)


def _innermost(trace: TracebackType) -> FrameType:
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame


def whereabouts(frame: FrameType) -> str:
    """What a thread does: the collective it waits in, if any, and the line of ours that called it."""
    stack = []
    while frame is not None:    # innermost first
        stack.append(frame)
        frame = frame.f_back
    ours = next((one for one in stack if one.f_code.co_filename.startswith(_PACKAGE)), stack[0])
    place = f"{ours.f_code.co_name} ({ours.f_code.co_filename.removeprefix(_PACKAGE)}:{ours.f_lineno})"
    calls = [one for one in stack if one.f_code.co_filename.endswith(_COLLECTIVES)]
    if calls:
        return f"waits in {_collective(calls[-1])}, called by {place}"
    return f"waits for no other rank in {stack[0].f_code.co_name} ({stack[0].f_code.co_filename}:{stack[0].f_lineno}), called by {place}"


def _collective(call: FrameType) -> str:
    values = call.f_locals
    held = next((values[name] for name in _TENSORS if values.get(name) is not None), None)
    held = held[0] if isinstance(held, list) and held else held
    of = f" of {str(held.dtype).removeprefix('torch.')} {list(held.shape)}" if isinstance(held, torch.Tensor) else ""
    group = values.get("group") or dist.group.WORLD
    try:
        return f"{call.f_code.co_name}{of}, call {group._get_sequence_number_for_group()} of the group of ranks {dist.get_process_group_ranks(group)}"
    except (AttributeError, KeyError, RuntimeError, ValueError):    # a group that is being made or taken apart
        return f"{call.f_code.co_name}{of}"
