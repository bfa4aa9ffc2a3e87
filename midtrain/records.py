"""Records of .jsonl (compressed too) and .parquet files as dicts, and text files, in pieces that can be read apart.

Where the cuts fall depends on the files and ``task_bytes`` alone. A record that cannot be read comes as a DataError in its place.
"""

import glob
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glm.data.documents import unreadable, user_files
from glm.data.problems import TASKS, training_problems
from glm.data.records import COMPRESSED, compressed_lines, lines_between, open_parquet
from glm.errors import DataError

if TYPE_CHECKING:
    import pyarrow

PROBLEMS = "problems"
KEY = "held out with"
"""In a record that knows it: documents of one key are held out for validation together, in every corpus."""


@dataclass(frozen=True)
class Piece:
    """Bytes [first, last) of a .jsonl file, row groups of a parquet file, the whole of a text or compressed file (last 0), or drawn problems."""

    file: str
    """A path, or PROBLEMS."""
    first: int
    last: int
    identity: str
    """Size and date of the file: changes when the records may have."""

    def as_input(self) -> dict:
        return asdict(self)


def expand(paths: tuple[str, ...], asked_at: str) -> list[Path]:
    """Names with ``*`` filled in, .list files read; each path once, in the order given. DataError for one that is not there."""
    found: list[Path] = []
    for given in paths:
        path = Path(given).expanduser().absolute()
        if path.suffix == ".list" and path.is_file():
            lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
            listed = tuple(str(path.parent / line) for line in lines if line and not line.startswith("#"))
            found += expand(listed, str(path))
        elif any(mark in given for mark in "*?["):
            matching = sorted(glob.glob(str(path)))
            if not matching:
                raise DataError(asked_at, f"{given}, which matches nothing", "at least one file or folder", "correct the path")
            found += map(Path, matching)
        elif path.exists():
            found.append(path)
        else:
            raise DataError(asked_at, f"no such file or folder: {given}", "a path that is there", "correct the path")
    return list(dict.fromkeys(found))


def pieces(paths: tuple[str, ...], asked_at: str, task_bytes: int) -> Iterator[Piece]:
    """Each file once, however many of the paths lead to it. Raises DataError."""
    files: dict[Path, Path] = {}
    for root in expand(paths, asked_at):
        for file in user_files(root, asked_at, COMPRESSED):
            files.setdefault(file.resolve(), file)
    for file in files.values():
        try:
            status = file.stat()
        except OSError as error:
            raise unreadable(file, error) from error
        identity = f"{status.st_size} {status.st_mtime_ns}"
        if file.suffix.lower() == ".jsonl":
            for first in range(0, max(1, status.st_size), task_bytes):
                yield Piece(str(file), first, min(first + task_bytes, status.st_size), identity)
        elif file.suffix.lower() == ".parquet":
            with open_parquet(file) as table:
                groups = table.metadata.num_row_groups
            step = max(1, groups * task_bytes // max(1, status.st_size))
            for first in range(0, groups, step):
                yield Piece(str(file), first, min(first + step, groups), identity)
        else:
            yield Piece(str(file), 0, 0, identity)


def records(piece: Piece, text_field: str = "text", seed: int = 0) -> Iterator[tuple[str, dict | DataError]]:
    """(where, record). A text file is one record with its text under ``text_field``; problems are drawn by ``seed``."""
    file = Path(piece.file)
    if piece.file == PROBLEMS:
        for problem in training_problems(TASKS, piece.last, seed):
            yield problem.key, {"question": problem.question, "reasoning": problem.reasoning, "answer": problem.answer, KEY: problem.key}
    elif file.suffix.lower() == ".jsonl":
        for start, raw in lines_between(file, piece.first, piece.last):
            yield f"{file}, byte {start}", _parsed(f"{file}, byte {start}", raw)
    elif file.name.endswith(COMPRESSED):
        for number, raw in compressed_lines(file):
            yield f"{file}, line {number}", _parsed(f"{file}, line {number}", raw)
    elif file.suffix.lower() == ".parquet":
        yield from _rows(file, piece.first, piece.last)
    else:
        try:
            yield str(file), {text_field: file.read_bytes().decode()}
        except OSError as error:
            raise unreadable(file, error) from error
        except UnicodeDecodeError as error:
            yield str(file), DataError(str(file), f"not UTF-8: {error.reason}", "UTF-8 text", "convert the file (iconv -t utf-8)")


def _parsed(where: str, raw: bytes) -> dict | DataError:
    expected, todo = "one JSON object a line", "correct or remove the line"
    try:
        record = json.loads(raw.decode())
        json.dumps(record, ensure_ascii=False).encode()    # a lone surrogate is JSON, but no text
    except (ValueError, RecursionError) as error:
        return DataError(where, f"not JSON in UTF-8: {error}", expected, todo)
    return record if isinstance(record, dict) else DataError(where, f"a {type(record).__name__}", expected, todo)


def _rows(file: Path, first: int, last: int) -> Iterator[tuple[str, dict | DataError]]:
    import pyarrow

    with open_parquet(file) as table:
        row = sum(table.metadata.row_group(group).num_rows for group in range(first))
        try:
            for batch in table.iter_batches(batch_size=256, row_groups=list(range(first, last))):
                for record in _dicts(batch):
                    where = f"{file}, row {row}"
                    broken = DataError(where, "bytes that are not UTF-8", "UTF-8 text", "correct or remove the row")
                    yield where, broken if record is None else record
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            todo = "write the file again or remove it"
            raise DataError(f"{file}, after row {row}", f"broken parquet: {error}", "whole row groups", todo) from error


def _dicts(batch: "pyarrow.RecordBatch") -> Iterator[dict | None]:
    """None for a row with a string that is not UTF-8, which arrow does not check when it reads."""
    try:
        for record in batch.to_pylist():
            yield {column: _as_written(value) for column, value in record.items()}
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            yield None
        else:
            for row in range(batch.num_rows):
                yield from _dicts(batch.slice(row, 1))


def _as_written(value: object) -> object:
    """Arrow gives an object all keys that any row of the column has: those that are null in this one were not written."""
    if isinstance(value, dict):
        return {key: _as_written(inner) for key, inner in value.items() if inner is not None}
    return [_as_written(inner) for inner in value] if isinstance(value, list) else value
