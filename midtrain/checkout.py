"""A repository on this machine: a git checkout, a bare git repository, or a plain folder. Git is only read, through its plumbing.

What is read of a git repository is its HEAD commit, not the working tree: the same commit gives the same documents.
"""

import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glm.errors import DataError, PlatformError
from midtrain.selection import reason_of_content, reason_of_path, reason_of_size, text_of

LINK, SUBMODULE = "120000", "160000"
QUIET = ("-c", "core.quotePath=false", "-c", "core.fsmonitor=false", "-c", "core.bigFileThreshold=4m", "-c", "gc.auto=0")
"""Paths as they are; nothing a checkout's configuration could start; large files are binary to diffs."""


@dataclass(frozen=True)
class Checkout:
    name: str
    path: str
    git_dir: str | None
    """None: a plain folder."""
    commit: str | None
    """HEAD; of a plain folder nothing."""


def git(git_dir: str, *words: str, given: bytes | None = None, allow: tuple[int, ...] = (0,)) -> bytes:
    """What git prints. Raises DataError with git's own words if it fails, PlatformError if there is no git."""
    try:
        done = subprocess.run(["git", f"--git-dir={git_dir}", *QUIET, *words], input=given, capture_output=True)
    except FileNotFoundError as error:
        raise PlatformError("git", "no such command", "git 2.30 or newer in PATH", "install git") from error
    if done.returncode not in allow:
        reason = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
        todo = "mend it (git fsck), or leave it out"
        raise DataError(str(git_dir), f"git {words[0]}: {reason}", "a git repository that can be read", todo)
    return done.stdout


def open_checkout(name: str, path: Path, *, history: bool) -> Checkout:
    """``history``: its commits will be asked for. Raises DataError if it cannot give what is asked."""
    if not path.is_dir():
        raise DataError(str(path), "no such folder", "a git checkout, a bare repository or a folder of sources", "correct the path")
    git_dir = _git_dir(path)
    if git_dir is None:
        if history:
            raise DataError(
                str(path), "a plain folder, not a git repository", "a git repository: commits and pull requests are asked for",
                "give a checkout, or a corpus of its own without commits and discussions",
            )
        return Checkout(name, str(path), None, None)
    head = git(git_dir, "rev-parse", "--verify", "--quiet", "HEAD^{commit}", allow=(0, 1, 128)).decode().strip()
    if not head:
        git(git_dir, "rev-parse", "--git-dir")    # says what is wrong if it is no repository at all
        todo = "commit or check out something, or leave it out"
        raise DataError(str(path), "a repository without commits", "at least one commit", todo)
    if git(git_dir, "config", "--get-regexp", r"^(remote\..*\.promisor|extensions\.partialclone)$", allow=(0, 1)):
        found = "a partial clone: git would download its files one by one"
        raise DataError(str(path), found, "a full clone", "git fetch --refetch --no-filter")
    if history and git(git_dir, "rev-parse", "--is-shallow-repository").strip() == b"true":
        raise DataError(
            str(path), "a shallow clone", "the history: commits and pull requests are asked for",
            "git fetch --unshallow, or ask for no history",
        )
    return Checkout(name, str(path), str(git_dir), head)


def _git_dir(path: Path) -> str | None:
    if (path / ".git").exists():
        return str(path / ".git")
    bare = (path / "HEAD").is_file() and (path / "objects").is_dir() and (path / "refs").is_dir()
    return str(path) if bare else None


def read_files(checkout: Checkout, largest: int, left_out: Counter) -> dict[str, str]:
    """Path -> text of what is worth reading, by path; reasons of the rest are counted."""
    listed = _tracked(checkout, left_out) if checkout.git_dir else _plain(checkout, left_out)
    wanted = []
    for path, where, size in listed:
        reason = reason_of_path(path) or reason_of_size(path, size, largest)
        if reason:
            left_out[reason] += 1
        else:
            wanted.append((path, where))
    contents = read_objects(checkout.git_dir, [where for _, where in wanted]) if checkout.git_dir else _read_plain(wanted)
    files = {}
    for (path, _), data in zip(wanted, contents):
        reason = "unreadable" if data is None else reason_of_content(data)
        if reason:
            left_out[reason] += 1
        else:
            files[path] = text_of(data)
    return files


def _tracked(checkout: Checkout, left_out: Counter) -> Iterator[tuple[str, str, int]]:
    """(path, object, bytes) of the files of the commit."""
    for line in git(checkout.git_dir, "ls-tree", "-r", "-z", "--long", "--full-tree", checkout.commit).split(b"\0"):
        if not line:
            continue
        facts, _, raw = line.partition(b"\t")
        mode, _, object_id, size = facts.decode().split()
        if mode in (LINK, SUBMODULE):
            left_out["link" if mode == LINK else "submodule"] += 1
            continue
        yield raw.decode(errors="replace"), object_id, int(size)


def read_objects(git_dir: str, objects: list[str]) -> Iterator[bytes | None]:
    """The content of each object; None for one that is missing. One git process for all, one object in memory at a time."""
    if not objects:
        return
    process = subprocess.Popen(
        ["git", f"--git-dir={git_dir}", *QUIET, "cat-file", "--batch"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )
    try:
        for object_id in objects:
            process.stdin.write(object_id.encode() + b"\n")
            process.stdin.flush()
            header = process.stdout.readline().split()
            if len(header) != 3 or header[1] != b"blob":
                if len(header) == 3:
                    process.stdout.read(int(header[2]) + 1)
                yield None
                continue
            data = process.stdout.read(int(header[2]) + 1)
            yield data[:-1]
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()


def _plain(checkout: Checkout, left_out: Counter) -> Iterator[tuple[str, Path, int]]:
    """As ``_tracked`` for a folder: hidden files and folders are left out, links are not followed. A folder that is a Python package
    itself gives its name to the paths, so that its own imports are understood."""
    root = Path(checkout.path)
    base = root.parent if (root / "__init__.py").is_file() else root
    for folder, folders, names in os.walk(root):
        left_out["hidden"] += sum(name.startswith(".") for name in folders)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(names):
            path = Path(folder) / name
            if name.startswith(".") or path.is_symlink() or not path.is_file():
                left_out["hidden" if name.startswith(".") else "link"] += 1
                continue
            yield path.relative_to(base).as_posix(), path, path.stat().st_size


def _read_plain(wanted: list[tuple[str, Path]]) -> Iterator[bytes | None]:
    for _, path in wanted:
        try:
            yield path.read_bytes()
        except OSError:
            yield None
