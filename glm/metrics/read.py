"""Reading back what a run wrote: JSON lines, tolerant of a line that a kill tore."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_BLOCK = 1 << 20
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class Lines:
    """The readable objects of a JSON-lines file, in file order, and how many lines were not readable."""

    records: list[dict]
    torn: int = 0


def read_lines(path: Path) -> Lines:
    """Objects of ``path``, one a line. A missing file has none. A torn or foreign line is skipped and counted."""
    if not path.exists():
        return Lines([])
    records, torn = [], 0
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:  # torn in the middle of a number, a string or a character
            torn += 1
            continue
        if isinstance(record, dict):
            records.append(record)
        else:  # "12" of a torn "123]" is still JSON
            torn += 1
    return Lines(records, torn)


def lines_backwards(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes without the newline) of the lines of ``path`` that are not empty, the last first, a block in memory at a time."""
    with path.open("rb") as file:
        start, rest = file.seek(0, os.SEEK_END), b""
        while start:
            stop, start = start, max(0, start - _BLOCK)
            file.seek(start)
            first, *lines = (file.read(stop - start) + rest).split(b"\n")
            end = stop + len(rest)
            for line in reversed(lines):
                if line:
                    yield end - len(line), line
                end -= len(line) + 1
            rest = first
        if rest:
            yield 0, rest


def as_number(value: object) -> float | None:
    """The float of a logged value; "nan" and "inf" come back as such; None when it is no number."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    return _NOT_FINITE.get(value) if isinstance(value, str) else None


@dataclass(frozen=True)
class StageMetrics:
    """The metric lines of one stage in the order of writing."""

    stage: str
    lines: list[dict] = field(default_factory=list)

    def having(self, name: str) -> list[dict]:
        return [line for line in self.lines if name in line]

    def series(self, name: str, against: str = "step") -> tuple[list[float], list[float]]:
        """(x, y) over the lines that have both numbers; the last line wins where two have the same step."""
        by_step: dict[float, tuple[float, float]] = {}
        for line in self.lines:
            x, y = as_number(line.get(against)), as_number(line.get(name))
            if x is not None and y is not None:
                by_step[line.get("step", x)] = (x, y)
        points = [by_step[step] for step in sorted(by_step)]
        return [x for x, _ in points], [y for _, y in points]

    def first(self, name: str) -> float | None:
        return next(iter(self.series(name)[1]), None)

    def last(self, name: str) -> float | None:
        values = self.series(name)[1]
        return values[-1] if values else None

    def names(self, prefix: str) -> list[str]:
        """Metric names that begin with ``prefix``, sorted."""
        return sorted({name for line in self.lines for name in line if name.startswith(prefix)})

    @property
    def steps(self) -> int:
        return int(max((line.get("step", 0) for line in self.lines), default=0))

    @property
    def seconds(self) -> float:
        """Seconds the stage ran, over all its starts."""
        return max((as_number(line.get("time_seconds")) or 0.0 for line in self.lines), default=0.0)


@dataclass(frozen=True)
class RunMetrics:
    """Stage name to its metrics, in order of first appearance, and the number of lines that were torn."""

    stages: dict[str, StageMetrics]
    torn: int


def read_run(run_folder: Path) -> RunMetrics:
    """The metrics of every stage of a run; empty when none was written yet."""
    lines = read_lines(Path(run_folder) / "metrics.jsonl")
    stages: dict[str, StageMetrics] = {}
    for record in lines.records:
        stage = str(record.get("stage", "?"))
        stages.setdefault(stage, StageMetrics(stage)).lines.append(record)
    return RunMetrics(stages, lines.torn)
