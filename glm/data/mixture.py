"""Which source the row number i of a stage comes from: evenly interleaved, so that shares hold over any prefix.

Source s asks for its k-th row at time (k + 1/2) / share; rows are served in the order of these times. After n rows a
source has had its share of n to within one row for every source there is. Nothing is drawn and nothing remembered: any row
can be found directly.
"""

from fractions import Fraction


class Interleaving:
    """``shares``: source -> positive weight; they need not sum to 1."""

    def __init__(self, shares: dict[str, float]):
        total = sum(map(Fraction, shares.values()))
        self.sources = tuple(shares)
        self._shares = [Fraction(share) / total for share in shares.values()]

    def _counts(self, first: int) -> list[int]:
        """Rows of each source among the first ``first`` ones."""
        start = max(Fraction(0), first - Fraction(len(self._shares), 2))  # no more than ``first`` rows come before this time
        counts = [int(start * share + Fraction(1, 2)) for share in self._shares]
        while sum(counts) < first:
            counts[self._next(counts)] += 1
        return counts

    def _next(self, counts: list[int]) -> int:
        times = [(count + Fraction(1, 2)) / share for count, share in zip(counts, self._shares)]
        return times.index(min(times))

    def rows(self, first: int, count: int) -> list[tuple[str, int]]:
        """(source, number of the row within its source) of rows first … first + count - 1."""
        counts = self._counts(first)
        served = []
        for _ in range(count):
            source = self._next(counts)
            served.append((self.sources[source], counts[source]))
            counts[source] += 1
        return served

    def counts(self, rows: int) -> dict[str, int]:
        return dict(zip(self.sources, self._counts(rows)))
