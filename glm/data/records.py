"""Records as files hold them: lines of a .jsonl file from byte to byte, lines of a compressed one, an open parquet file."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from glm.data.documents import unreadable
from glm.errors import DataError

if TYPE_CHECKING:
    import pyarrow.parquet

COMPRESSED = (".jsonl.gz", ".jsonl.zst")
READ_AT_ONCE = 1 << 20


def lines_between(file: Path, first: int, last: int) -> Iterator[tuple[int, bytes]]:
    """(first byte, line) of the lines that begin in bytes [first, last), blank ones left out. Raises DataError."""
    try:
        with file.open("rb") as lines:
            if first:
                lines.seek(first - 1)
                lines.readline()    # the end of a line that began before
            while (start := lines.tell()) < last and (raw := lines.readline()):
                if raw.strip():
                    yield start, raw
    except OSError as error:
        raise unreadable(file, error) from error


def compressed_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a file whose name ends in one of COMPRESSED, blank lines left out. Raises DataError."""
    import pyarrow

    try:
        with gzip.open(file) if file.suffix == ".gz" else pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd") as stream:
            for number, raw in enumerate(_split(stream), start=1):
                if raw.strip():
                    yield number, raw
    except (OSError, EOFError, zlib.error) as error:
        found, todo = f"not readable to its end: {error}", "write the file again or remove it"
        raise DataError(str(file), found, "compressed lines of JSON", todo) from error


def _split(stream) -> Iterator[bytes]:
    rest = b""
    while chunk := stream.read(READ_AT_ONCE):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest


def open_parquet(file: Path) -> "pyarrow.parquet.ParquetFile":
    """Raises DataError."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(str(file), f"not readable as parquet: {error}", "a parquet file", "write the file again or remove it") from error
