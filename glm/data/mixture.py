"""Which source the row number i of a stage comes from: evenly interleaved, so that shares hold over any prefix.

Source s asks for its k-th row at time (k + 1/2) / share; rows are served in the order of these times. After n rows a
source has had its share of n to within one row for every source there is. Nothing is drawn and nothing remembered: any row
can be found directly. Times are whole numbers, so that no rounding depends on where reading starts.
"""

from fractions import Fraction
from heapq import heapify, heapreplace

ROW_TIME = 2**65
"""Time from one row to the next, on average."""


class Interleaving:
    """``shares``: source -> positive weight; they need not sum to 1."""

    def __init__(self, shares: dict[str, float]):
        total = sum(map(Fraction, shares.values()))
        self.sources = tuple(shares)
        self._halves = [round(ROW_TIME // 2 * total / Fraction(share)) for share in shares.values()]
        """Half the time from one row of a source to its next, which is also the time of its first."""

    def _start(self, first: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Rows of each source among the first ``first`` ones, and the heap of (time of the next row, source)."""
        early = max(0, (2 * first - len(self._halves) - 2) * ROW_TIME // 2)  # no more than ``first`` rows come before this time
        counts = [max(0, -(-(early - half) // (2 * half))) for half in self._halves]
        heap = [(half * (2 * count + 1), source) for source, (half, count) in enumerate(zip(self._halves, counts))]
        heapify(heap)
        for _ in range(first - sum(counts)):
            counts[self._serve(heap)] += 1
        return counts, heap

    def _serve(self, heap: list[tuple[int, int]]) -> int:
        time, source = heap[0]
        heapreplace(heap, (time + 2 * self._halves[source], source))
        return source

    def rows(self, first: int, count: int) -> list[tuple[str, int]]:
        """(source, number of the row within its source) of rows first … first + count - 1."""
        counts, heap = self._start(first)
        served = []
        for _ in range(count):
            source = self._serve(heap)
            served.append((self.sources[source], counts[source]))
            counts[source] += 1
        return served

    def counts(self, rows: int) -> dict[str, int]:
        """Rows of each source among the first ``rows``."""
        return dict(zip(self.sources, self._start(rows)[0]))
