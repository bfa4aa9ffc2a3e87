"""Digests of corpora, read once: RUN/data/verified.json remembers size and date of every file that had the digest it was written with."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from glm.checkpoint.run_folder import write_json
from glm.data.tokenized import digest_of_file, files_of, read_facts, torn
from glm.errors import DataError

RECORD = "verified.json"
AT_ONCE = 64
"""Files after which the record is written: a start that is killed on the way begins no earlier."""


def verify(folder: Path, name: str) -> None:
    """Reads those files of a corpus that the record does not know as they are, several at once. Raises DataError for a torn one."""
    facts = read_facts(folder, name)
    if facts is None:
        return
    files = {file: [of["bytes"], (folder / file).stat().st_mtime_ns, of["blake2b"]] for file, of in files_of(folder, name, facts).items()}
    record = _record(folder)
    changed = [file for file, known in files.items() if record.get(file) != known]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        for first in range(0, len(changed), AT_ONCE):
            some = changed[first : first + AT_ONCE]
            for file, found in zip(some, threads.map(lambda file: digest_of_file(folder / file), some)):
                if found != files[file][2]:
                    raise torn(folder / file, name, "another digest than when it was written", f"blake2b {files[file][2]}")
                record[file] = files[file]
            write_json(folder / RECORD, record)


def _record(folder: Path) -> dict[str, list]:
    path = folder / RECORD
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise DataError(str(path), f"not readable: {error}", "what was verified before", "remove it; all files are then read again") from error
