"""Raw sources as records, cut into pieces that can be read apart.

A piece (``Piece``) is a few small files, a range of bytes of a large .jsonl, row groups of a parquet file, rows of a saved
dataset, one shard of a streamed one, or a corpus of the Python installation. Where the cuts fall depends on the source and on
``task_bytes`` alone. A record is (name, text); the name says where it lies in its source, whatever the cuts. A record that cannot
be read is (name, DataError).
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from glm.data.documents import UNDECODABLE, column_texts, corpus_fingerprint, documents, record_text, unreadable, user_files
from glm.data.records import COMPRESSED, compressed_lines, lines_between, open_parquet
from glm.errors import DataError
from glm.recipe.raw import RawSource

Record = tuple[str, "str | DataError"]


@dataclass(frozen=True)
class Piece:
    """What one task reads; JSON values. ``first`` and ``last`` (not included): bytes, row groups, rows or the number of a shard."""

    kind: str
    names: tuple[str, ...]
    first: int = 0
    last: int = 0
    identity: str = ""
    """Changes when the records may have: sizes and dates of the files."""

    def as_input(self) -> dict:
        return {**asdict(self), "names": list(self.names)}

    @classmethod
    def of_input(cls, given: dict) -> "Piece":
        return cls(**{**given, "names": tuple(given["names"])})


def pieces(name: str, source: RawSource, task_bytes: int, problems: int, seed: int) -> list[Piece]:
    """The pieces of a source in reading order. Raises DataError for a source that is not there."""
    if source.load_dataset:
        shards = _stream(source).n_shards
        return [Piece("stream", (), shard, shards) for shard in range(shards)]
    if source.path is None:
        return [Piece("corpus", (source.corpus,), problems, seed, identity=corpus_fingerprint(source.corpus, None, problems, seed))]
    root = Path(source.path).expanduser().absolute()
    if (root / "dataset_info.json").is_file() and (root / "state.json").is_file():
        return _pieces_of_dataset(root, task_bytes)
    return list(_pieces_of_files(root, user_files(root, f"sources.{name}.path", COMPRESSED), task_bytes))


def _pieces_of_files(root: Path, files: list[Path], task_bytes: int) -> Iterator[Piece]:
    """Small files together, up to ``task_bytes``; a large .jsonl or parquet file in several pieces."""
    together, size = [], 0
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise unreadable(file, error) from error
        entry = (file, f"{status.st_size} {status.st_mtime_ns}")
        suffix = file.suffix.lower()
        if status.st_size > task_bytes and suffix in (".jsonl", ".parquet"):
            if together:
                yield _piece_of_files(root, together)
                together, size = [], 0
            if suffix == ".jsonl":
                for first in range(0, status.st_size, task_bytes):
                    yield Piece("lines", (str(root), str(file)), first, min(first + task_bytes, status.st_size), entry[1])
            else:
                yield from _pieces_of_parquet(root, file, entry[1], task_bytes)
        else:
            if together and size + status.st_size > task_bytes:
                yield _piece_of_files(root, together)
                together, size = [], 0
            together.append(entry)
            size += status.st_size
    if together:
        yield _piece_of_files(root, together)


def _piece_of_files(root: Path, together: list[tuple[Path, str]]) -> Piece:
    return Piece("files", (str(root), *(str(file) for file, _ in together)), identity=" ".join(identity for _, identity in together))


def _pieces_of_parquet(root: Path, file: Path, identity: str, task_bytes: int) -> Iterator[Piece]:
    with open_parquet(file) as table:
        sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.metadata.num_row_groups)]
    first, size = 0, 0
    for group, more in enumerate(sizes):
        if group > first and size + more > task_bytes:
            yield Piece("row_groups", (str(root), str(file)), first, group, identity)
            first, size = group, 0
        size += more
    yield Piece("row_groups", (str(root), str(file)), first, len(sizes), identity)


def _pieces_of_dataset(root: Path, task_bytes: int) -> list[Piece]:
    dataset = _saved_dataset(root)
    rows_at_once = max(1, len(dataset) * task_bytes // max(1, dataset.data.nbytes))
    return [
        Piece("rows", (str(root),), first, min(first + rows_at_once, len(dataset)), dataset._fingerprint)
        for first in range(0, len(dataset), rows_at_once)
    ]


def read(piece: Piece, source: RawSource) -> Iterator[Record]:
    """The records of a piece. Raises DataError where a whole file cannot be read."""
    if piece.kind == "corpus":
        yield from documents(piece.names[0], None, piece.first, piece.last)
    elif piece.kind == "stream":
        yield from _rows(f"shard {piece.first}", 0, _stream(source).shard(piece.last, piece.first), source.text_field)
    elif piece.kind == "rows":
        rows = _saved_dataset(Path(piece.names[0])).select(range(piece.first, piece.last))
        yield from _rows("", piece.first, rows, source.text_field)
    else:
        root, files = Path(piece.names[0]), [Path(name) for name in piece.names[1:]]
        for file in files:
            name = file.name if file == root else file.relative_to(root).as_posix()
            suffix = file.suffix.lower()
            if file.name.endswith(COMPRESSED):
                yield from _compressed_lines(file, name, source.text_field)
            elif suffix == ".jsonl":
                yield from _lines(file, name, piece.first, piece.last or file.stat().st_size, source.text_field)
            elif suffix == ".parquet":
                yield from _parquet(file, name, piece, source.text_field)
            else:
                yield name, _text(file)


def _text(file: Path) -> str | DataError:
    try:
        return file.read_bytes().decode()
    except OSError as error:
        raise unreadable(file, error) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        found = f"byte 0x{error.object[error.start]:02x}, which is not UTF-8"
        return DataError(f"{file}, line {line}", found, "UTF-8 text", "convert the file (iconv -t utf-8) or move it away")


def _attempt(where: Callable[[], str], raw: bytes, field: str) -> str | DataError:
    """``where``: called for a broken record only."""
    try:
        return record_text("", raw, field)
    except DataError as error:
        return DataError(where(), error.found, error.expected, error.todo)


def _lines(file: Path, name: str, first: int, last: int, field: str) -> Iterator[Record]:
    """Lines that begin in bytes [first, last) of the file; a line is named by its first byte."""
    for start, raw in lines_between(file, first, last):
        yield f"{name}:{start}", _attempt(lambda: f"{file}, line {_lines_before(file, start) + 1}", raw, field)


def _lines_before(file: Path, end: int) -> int:
    with file.open("rb") as data:
        chunks = iter(lambda: data.read(min(1 << 20, end - data.tell())), b"")
        return sum(chunk.count(b"\n") for chunk in chunks)


def _compressed_lines(file: Path, name: str, field: str) -> Iterator[Record]:
    for number, raw in compressed_lines(file):
        yield f"{name}:line {number}", _attempt(lambda: f"{file}, line {number}", raw, field)


def _parquet(file: Path, name: str, piece: Piece, field: str) -> Iterator[Record]:
    import pyarrow

    with open_parquet(file) as table:
        if field not in table.schema_arrow.names:
            found, todo = f"columns {', '.join(table.schema_arrow.names)}", "name the column with `text_field`"
            raise DataError(str(file), found, f'a column "{field}" of strings', todo)
        groups = range(piece.first, piece.last) if piece.kind == "row_groups" else range(table.metadata.num_row_groups)
        row = sum(table.metadata.row_group(group).num_rows for group in range(groups.start))
        try:
            for batch in table.iter_batches(batch_size=1024, row_groups=list(groups), columns=[field]):
                for text in column_texts(batch.column(0)):
                    yield f"{name}:row {row}", _checked(text, f"{file}, row {row}", field)
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            todo = "write the file again or remove it"
            raise DataError(f"{file}, after row {row}", f"broken parquet: {error}", "whole row groups", todo) from error


def _checked(text: object, where: str, field: str) -> str | DataError:
    if isinstance(text, str):
        return text
    found = "bytes that are not UTF-8" if text is UNDECODABLE else f'"{field}" is a {type(text).__name__}'
    return DataError(where, found, f'a "{field}" string', "correct or remove the row")


def _saved_dataset(root: Path):
    import datasets

    return datasets.load_from_disk(str(root))


def _stream(source: RawSource):
    """The dataset of ``load_dataset`` as a stream. Raises DataError if it cannot be opened."""
    import datasets

    arguments = {"split": "train", **source.load_dataset}
    try:
        return datasets.load_dataset(**arguments, streaming=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"load_dataset {arguments}", f"{type(error).__name__}: {error}", "a dataset", "correct the arguments") from error


def _rows(prefix: str, first: int, rows, field: str) -> Iterator[Record]:
    for row, record in zip(itertools.count(first), rows):
        where = f"{prefix} row {row}".strip()
        yield where, _checked(record.get(field), where, field)
