"""The metric log of one stage: a line in metrics.jsonl, one on the console, one to wandb."""

import json
import math
import os
import time
from pathlib import Path

from glm.checkpoint.run_folder import RunFolder, write_atomically
from glm.metrics.console import Console
from glm.metrics.read import as_number, lines_backwards, read_lines
from glm.recipe import sections

_ALWAYS_KEPT = ("eval/", "validation/")


class MetricLog:
    """Appends ``{"stage", "step", "time_seconds", **metrics}`` to RUN/metrics.jsonl and shows it.

    ``time_seconds`` counts the seconds the stage has run, over all its starts. Only rank 0 passes ``enabled=True``; on the
    others every method does nothing. One stage writes at a time. ``logging.every_steps`` thins the lines of steps;
    the first, the last, detailed ones, evaluations and validations are always written. Raises PlatformError when wandb is asked for and missing.
    """

    def __init__(self, run_folder: Path, stage: str, *, total_steps: int | None, enabled: bool = True,
                 logging: sections.Logging = sections.Logging(), config: dict | None = None):
        self.stage, self.total_steps, self.enabled, self.logging = stage, total_steps, enabled, logging
        self._file = self._console = self._wandb = None
        if not enabled:
            return
        self.path = RunFolder(Path(run_folder)).metrics
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._mark = json.dumps(stage).encode()
        self._written_any = False
        self._started = time.monotonic()
        self._cut_torn_end()
        self._file = self.path.open("ab")
        self._seconds_before = _seconds_of(next(filter(None, (self._own(line) for _, line in lines_backwards(self.path))), None))
        if logging.wandb != "off":
            from glm.metrics.sinks import WandbSink

            self._wandb = WandbSink(Path(run_folder), stage, logging, config)
        self._console = Console(stage, total_steps)

    def line(self, step: int, metrics: dict) -> bool:
        """Writes one event of ``step``. Values: numbers, strings, and lists of them; tensors and arrays are turned into those.

        Whether it was written: lines of steps are thinned."""
        if not self.enabled:
            return False
        metrics = {name: _plain(value) for name, value in metrics.items()}
        record = {"stage": self.stage, "step": int(step), "time_seconds": round(self._seconds(), 3), **metrics}
        if due := self._is_due(step, metrics):
            # One write call of a whole line: a kill leaves at most one torn line, the last.
            self._file.write(json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            self._written_any = True
            if self._wandb:
                self._wandb.line(step, metrics)
            self._console.line(step, metrics)
        self._console.advance(step, metrics)
        return due

    def rewind(self, step: int) -> list[dict]:
        """Drops this stage's lines with a later step than ``step``, for a stage that resumes there; -1 drops them all.

        Returns what was dropped, oldest first. Reads and keeps in memory only what lies behind ``step``."""
        if not self.enabled:
            return []
        self._file.close()
        dropped, cut, others, mixed, last = [], None, False, False, None
        for offset, line in lines_backwards(self.path):
            record = self._own(line)
            if record is None:
                others = True
            elif record.get("step", 0) > step:
                dropped.append(record)
                cut, mixed = offset, others
            else:
                last = record    # a stage's lines are in the order of its steps
                break
        if mixed:    # a stage made anew after others
            write_atomically(self.path, "".join(
                json.dumps(record, separators=(",", ":")) + "\n" for record in read_lines(self.path).records
                if record.get("stage") != self.stage or record.get("step", 0) <= step
            ))
        elif cut is not None:
            os.truncate(self.path, cut)
        self._file = self.path.open("ab")
        self._seconds_before = _seconds_of(last)
        return dropped[::-1]

    def close(self) -> None:
        """Ends the progress bar and the wandb run. Twice is once."""
        if self._file and not self._file.closed:
            self._file.close()
            self._console.close()
            if self._wandb:
                self._wandb.close()

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _is_due(self, step: int, metrics: dict) -> bool:
        return (step % self.logging.every_steps == 0 or self.logging.is_detailed(step) or step == self.total_steps or not self._written_any
                or any(name.startswith(_ALWAYS_KEPT) for name in metrics))

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _own(self, line: bytes) -> dict | None:
        """The record of this stage in a line; None for another stage's, which are many and not parsed, and for a torn one."""
        if self._mark not in line:
            return None
        try:
            record = json.loads(line)
        except ValueError:
            return None
        return record if isinstance(record, dict) and record.get("stage") == self.stage else None

    def _cut_torn_end(self) -> None:
        """Cuts a last line without its newline: what is appended must not become part of it."""
        offset, line = next(lines_backwards(self.path), (0, b"")) if self.path.exists() else (0, b"")
        if line and offset + len(line) == self.path.stat().st_size:
            os.truncate(self.path, offset)


def _seconds_of(record: dict | None) -> float:
    """``time_seconds`` of a stage's last line, so that a resumed stage counts on."""
    return as_number((record or {}).get("time_seconds")) or 0.0


def _plain(value: object) -> object:
    """What JSON can hold: arrays and tensors as lists, numbers that are not finite as "nan", "inf", "-inf"."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
