"""Where training text comes from: the corpora by name, and the user's own files.

A corpus is an iterator of (name, text); the same installation or folder always gives the same documents in the same order.
"""

import hashlib
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from glm.data import python_corpus
from glm.data.conversations import problem_dialogues, problem_documents, problem_texts
from glm.errors import DataError
from glm.recipe.sections import BUILT_IN_CORPORA

TEXT_CORPORA = {"prose": python_corpus.prose, "code": python_corpus.code, "repositories": python_corpus.repositories}
CORPORA = BUILT_IN_CORPORA

DEFAULT_CORPUS_BYTES = 4_500_000
"""Bound on one corpus of the Python installation: about 1.5M tokens of a small vocabulary. The user's own text has none."""

TEXT_SUFFIXES = {
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu",
    ".java", ".js", ".ts", ".go", ".rs", ".rb", ".php", ".cs", ".scala", ".kt", ".swift", ".sh", ".sql", ".toml", ".yaml", ".yml",
}
RECORD_SUFFIXES = {".jsonl", ".parquet"}
UNDECODABLE = object()
"""Stands for a parquet value that is not UTF-8."""


def check_corpus(name: str) -> None:
    if name not in CORPORA:
        raise DataError(
            f"corpus {name!r} of a mixture", "no corpus of that name", "one of " + ", ".join(CORPORA), "correct the mixture file"
        )


def documents(corpus: str, path: str | None, problems: int, seed: int, *, limit_bytes: int = DEFAULT_CORPUS_BYTES,
              mixed: bool = False) -> Iterator[tuple[str, str]]:
    """The (name, text) documents of a corpus that is text (not ``dialogues``).

    ``path``: the user's own text in place of prose, code and repositories; ``mixed`` reads its files in a shuffled order, for a
    reader who stops early. The name of a problem is its key. Raises DataError for text that cannot be read.
    """
    check_corpus(corpus)
    if corpus == "problems":
        yield from problem_documents(problems, seed)
    elif path is not None:
        yield from user_documents(Path(path), mixed=mixed)
    else:
        taken = 0
        for name, text in TEXT_CORPORA[corpus]():
            size = len(text.encode())
            yield name, text
            taken += size
            if taken >= limit_bytes:
                return


def dialogues(problems: int, seed: int) -> list[tuple[str, list[dict[str, str]], bool]]:
    """Chats as (key of the problem, messages, whether the assistant thinks)."""
    return problem_dialogues(problems, seed)


def user_files(path: Path, asked_at: str = "data.documents", more_suffixes: tuple[str, ...] = ()) -> list[Path]:
    """The files of the user's folder (or the one file), sorted. Hidden ones and unknown suffixes in a folder are left out."""
    if path.is_file():
        return [path]
    expected = f"text ({', '.join(sorted(TEXT_SUFFIXES))}), .jsonl or .parquet files"
    if not path.is_dir():
        raise DataError(f"{asked_at} {path}", "no such file or folder", expected, "correct the path")
    files = sorted(
        file for file in path.rglob("*")
        if (file.suffix.lower() in TEXT_SUFFIXES | RECORD_SUFFIXES or file.name.endswith(more_suffixes)) and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        others = sorted({file.suffix or file.name for file in path.rglob("*") if file.is_file()})
        found = f"no such file, only {', '.join(others[:8])}" if others else "an empty folder"
        raise DataError(f"{asked_at} {path}", found, expected, f"put text there, or leave {asked_at} out")
    return files


def unreadable(file: Path, error: OSError) -> DataError:
    todo = "give yourself the right to read it, or move it away"
    return DataError(str(file), f"not readable: {error.strerror or error}", "a file that can be read", todo)


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise unreadable(file, error) from error


def _check_encoding(files: list[Path]) -> None:
    """Raises DataError naming the first file that is not UTF-8, and how many are not."""
    broken: list[tuple[Path, UnicodeDecodeError]] = []
    for file in files:
        if file.suffix.lower() not in RECORD_SUFFIXES:
            try:
                _read_bytes(file).decode()
            except UnicodeDecodeError as error:
                broken.append((file, error))
    if broken:
        file, error = broken[0]
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"{file}, line {line}",
            f"byte 0x{error.object[error.start]:02x}, which is not UTF-8 ({len(broken)} of {len(files)} files are not)",
            "UTF-8 text", "convert the files (iconv -t utf-8) or move them away",
        )


def user_documents(path: Path, *, mixed: bool = False) -> Iterator[tuple[str, str]]:
    """One document per text file, per jsonl line and per parquet row."""
    files = user_files(path)
    _check_encoding(files)
    if mixed:
        random.Random(0).shuffle(files)
    for file in files:
        suffix = file.suffix.lower()
        if suffix == ".jsonl":
            yield from _jsonl_documents(file)
        elif suffix == ".parquet":
            yield from _parquet_documents(file)
        else:
            yield str(file), _read_bytes(file).decode()


def _jsonl_documents(file: Path) -> Iterator[tuple[str, str]]:
    try:
        with file.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                if raw.strip():
                    where = f"{file}, line {number}"
                    yield where, record_text(where, raw)
    except OSError as error:
        raise unreadable(file, error) from error


def record_text(where: str, raw: bytes, field: str = "text") -> str:
    """The text of one line of a jsonl file. Raises DataError."""
    expected, todo = f'one JSON object a line with a "{field}" string', "correct or remove the line"
    try:
        record = json.loads(raw.decode())
    except RecursionError as error:
        raise DataError(where, "JSON nested too deeply to be read", expected, todo) from error
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise DataError(where, f"not JSON in UTF-8: {error}", expected, todo) from error
    if not isinstance(record, dict) or field not in record:
        found = f"keys {', '.join(sorted(record))}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise DataError(where, found, expected, todo)
    if not isinstance(record[field], str):
        raise DataError(where, f'"{field}" is a {type(record[field]).__name__}', expected, todo)
    try:
        record[field].encode()
    except UnicodeEncodeError as error:
        raise DataError(where, f'"{field}" is not Unicode: {error.reason}', expected, todo) from error
    return record[field]


def _parquet_documents(file: Path) -> Iterator[tuple[str, str]]:
    import pyarrow
    import pyarrow.parquet

    expected = 'a parquet file with a column "text" of strings'
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(str(file), f"not readable as parquet: {error}", expected, "write the file again or remove it") from error
    with table:
        names = table.schema_arrow.names
        if "text" not in names:
            raise DataError(str(file), f"columns {', '.join(names)}", expected, 'rename the text column to "text"')
        row = 0
        try:
            for batch in table.iter_batches(batch_size=1024, columns=["text"]):
                for text in column_texts(batch.column(0)):
                    if not isinstance(text, str):
                        found = "bytes that are not UTF-8" if text is UNDECODABLE else f'"text" is a {type(text).__name__}'
                        raise DataError(f"{file}, row {row}", found, expected, "correct or remove the row")
                    yield f"{file}, row {row}", text
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            todo = "write the file again or remove it"
            raise DataError(f"{file}, after row {row}", f"broken parquet: {error}", expected, todo) from error


def column_texts(column) -> Iterator[object]:
    """The values of an arrow column; UNDECODABLE for one that calls itself a string and is not UTF-8, which arrow does not
    check when it reads."""
    try:
        yield from column.to_pylist()
    except UnicodeDecodeError:
        for value in column:
            try:
                yield value.as_py()
            except UnicodeDecodeError:
                yield UNDECODABLE


def corpus_fingerprint(corpus: str, path: str | None, problems: int, seed: int) -> str:
    """Changes when the documents of a corpus may have: names, sizes and dates of files; for problems, count, seed and format; for
    the Python installation its version, and for prose the installed packages with theirs."""
    digest = hashlib.blake2b(digest_size=8)
    if corpus in ("problems", "dialogues"):
        sample = problem_texts(min(problems, 16), seed)
        digest.update(json.dumps([corpus, problems, seed, sample]).encode())
    elif path is not None:
        for file in user_files(Path(path)):
            try:
                status = file.stat()
            except OSError as error:
                raise unreadable(file, error) from error
            digest.update(os.fsencode(file) + f" {status.st_size} {status.st_mtime_ns}\n".encode())
    else:
        digest.update(f"{corpus} {sys.version} {DEFAULT_CORPUS_BYTES}".encode())
        if corpus == "prose":
            digest.update(" ".join(python_corpus.installed_packages()).encode())
    return digest.hexdigest()
