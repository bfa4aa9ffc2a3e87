"""What a scheduler says to `glm run`, and how a stage that obeyed ends."""

import signal
import time
from contextlib import ExitStack

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Within ``with``: SIGTERM and SIGUSR1 are noted in ``asked`` (the signal's name), instead of ending this process."""

    def __init__(self):
        self.asked: str | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "StopSignals":
        for number in SIGNALS:
            self._stack.callback(signal.signal, number, signal.signal(number, self._note))
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def sleep(self, seconds: float) -> None:
        """Less when asked."""
        deadline = time.monotonic() + seconds
        while self.asked is None and time.monotonic() < deadline:
            time.sleep(min(0.2, seconds))

    def _note(self, number: int, frame) -> None:
        self.asked = signal.Signals(number).name


class Requeued(Exception):
    """The scheduler asked to stop and the ranks are gone. ``saved``: they saved the step they were at."""

    def __init__(self, stage: str, saved: bool):
        self.stage, self.saved = stage, saved
        super().__init__(stage)
