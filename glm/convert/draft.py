"""The folder a conversion writes before it is published, and the journal that lets the same command continue after a kill.

The journal's first line says what is converted, from what and how; each further line names a piece whose bytes are on the
disk, with their digests. A piece without a line is written again.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import BinaryIO

from glm.checkpoint.run_folder import sync
from glm.errors import CheckpointError, PlatformError

JOURNAL = "journal.jsonl"


class Draft:
    """One folder being written by one process. A context manager: leaving it closes the journal and keeps the folder.

    ``job`` is everything the result depends on; ``files`` {name: bytes} of what is to be written. Raises CheckpointError for
    a draft that was begun for something else or is being written now, PlatformError when the disk has no room for it.
    """

    def __init__(self, folder: Path, job: dict[str, object], files: dict[str, int]):
        self.folder = folder
        self.done: dict[str, list[str]] = {}
        """{piece: digests of its parts} of the pieces that need not be written again."""
        self._journal = _locked_journal(folder)
        try:
            self._continue_or_begin(json.loads(json.dumps(job)))
            self._require_space(files)
            for name, size in files.items():
                (folder / name).touch()
                os.truncate(folder / name, size)
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> "Draft":
        return self

    def __exit__(self, *_) -> None:
        self._journal.close()

    def finished(self, pieces: dict[str, list[str]], files: set[str]) -> None:
        """Notes ``pieces`` once the ``files`` they lie in are on the disk."""
        for name in files:
            sync(self.folder / name)
        self._journal.write(b"".join(json.dumps({"piece": name, "digests": digests}).encode() + b"\n" for name, digests in pieces.items()))
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self.done |= pieces

    def complete(self) -> None:
        """Returns when all in the folder, and the folder itself, is on the disk; it can be renamed then."""
        for path in self.folder.rglob("*"):
            sync(path)
        sync(self.folder)

    def published(self, final: Path) -> None:
        """Removes the journal from the folder, which was renamed to ``final``: until then it tells others that all this is work done."""
        (final / JOURNAL).unlink()
        sync(final)

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._journal.close()  # last, as it holds the lock

    def _continue_or_begin(self, job: dict) -> None:
        self._journal.seek(0)
        lines = self._journal.read().split(b"\n")
        whole = lines[:-1]  # what follows the last line break was cut by the kill
        if not whole:
            _remove_all_but_journal(self.folder)
            self._journal.truncate(0)
            self._journal.write(json.dumps(job).encode() + b"\n")
            return
        began = json.loads(whole[0])
        if began != job:
            differing = sorted(key for key in began.keys() | job.keys() if began.get(key) != job.get(key))
            raise CheckpointError(
                str(self.folder), f"begun with another {', another '.join(differing)}", "what this command converts",
                f"run the command it was begun with, or remove {self.folder} to begin anew",
            )
        self.done = {entry["piece"]: entry["digests"] for entry in map(json.loads, whole[1:])}
        if lines[-1]:
            self._journal.truncate(self._journal.tell() - len(lines[-1]))

    def _require_space(self, files: dict[str, int]) -> None:
        there = sum((self.folder / name).stat().st_blocks * 512 for name in files if (self.folder / name).exists())
        needed, free = sum(files.values()) - there, shutil.disk_usage(self.folder).free
        if free < needed:
            raise PlatformError(
                str(self.folder), f"{free / 1e9:.2f} GB free", f"{needed / 1e9:.2f} GB",
                "make room and run the same command again",
            )


def _locked_journal(folder: Path) -> BinaryIO:
    """The open journal of ``folder``, both made if need be, in a folder that no other process writes or renames meanwhile."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / JOURNAL
        try:
            journal = path.open("a+b")
        except FileNotFoundError:
            continue  # the folder was published or discarded since it was there
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process ends
        except BlockingIOError:
            journal.close()
            raise CheckpointError(
                str(folder), "another process is writing it", "one conversion to a place at a time", "wait for it, or end it",
            ) from None
        if path.exists() and os.path.samestat(os.fstat(journal.fileno()), path.stat()):
            return journal
        journal.close()  # that of a folder published or discarded between opening and locking


def _remove_all_but_journal(folder: Path) -> None:
    """What a writer that does not continue left."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != JOURNAL:
            path.unlink()


def fingerprint(folder: Path, names: list[str]) -> dict[str, list[int]]:
    """{file: [bytes, time of the last change]}: what a continued conversion compares to know that its source is the same."""
    return {name: [(folder / name).stat().st_size, (folder / name).stat().st_mtime_ns] for name in sorted(names)}
