"""Seconds of the phases of a step."""

import time
from collections import defaultdict
from contextlib import contextmanager


class Phases:
    """``with phases("data"): ...`` adds to the seconds of that phase. A phase inside another counts in both."""

    def __init__(self):
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str):
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def so_far(self) -> dict[str, float]:
        """{phase: seconds} since the last ``clear``. What ends later, such as writing the line that tells this, counts after it."""
        return dict(self._seconds)

    def clear(self) -> None:
        self._seconds.clear()
