"""A child process that does not outlive the one that started it."""

import ctypes
import os
import signal
import sys

PARENT_VARIABLE = "GLM_PARENT_PID"
"""Set by glm/launch to the launcher's process id."""
_PR_SET_PDEATHSIG = 1    # linux/prctl.h


def die_with_parent() -> None:
    """The kernel kills this process when the thread that started it ends, however it ends. Call first thing.

    A parent that died before the call is noticed by its id, if it told us its id in the environment. Without that
    variable (under torchrun, say) whoever started this process is the parent. Does nothing outside Linux.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    expected = os.environ.pop(PARENT_VARIABLE, None)    # popped: for a process we start it would name the wrong parent
    if expected is not None and os.getppid() != int(expected):
        os.kill(os.getpid(), signal.SIGKILL)
