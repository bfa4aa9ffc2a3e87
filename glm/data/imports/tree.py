"""The paths of a repository, and which of them an import may mean."""

from collections import defaultdict
from collections.abc import Iterable
from posixpath import basename, dirname, normpath, splitext


def suffix(path: str) -> str:
    return splitext(path)[1].lower()


def ancestors(folder: str) -> list[str]:
    """``a/b`` -> ``a/b``, ``a`` and the repository itself (an empty string)."""
    found = [folder]
    while folder:
        folder = dirname(folder)
        found.append(folder)
    return found


class Tree:
    """``files``: path -> text."""

    def __init__(self, files: dict[str, str]):
        self.files = files
        self._named: dict[str, list[str]] = defaultdict(list)
        self.inside: dict[str, list[str]] = defaultdict(list)
        """folder -> its files, sorted"""
        for path in sorted(files):
            self._named[basename(path)].append(path)
            self.inside[dirname(path)].append(path)

    def of_language(self, *endings: str) -> list[str]:
        return [path for path in sorted(self.files) if suffix(path) in endings]

    def named(self, name: str) -> list[str]:
        """Paths of the files of that name, sorted."""
        return self._named.get(name, [])

    def relative(self, folder: str, reference: str) -> str | None:
        """``reference`` from ``folder``, without dots; None if it leaves the repository."""
        path = normpath(f"{folder}/{reference}" if folder else reference)
        return None if path.startswith(("..", "/")) else "" if path == "." else path

    def first(self, candidates: Iterable[str | None]) -> str | None:
        return next((path for path in candidates if path in self.files), None)

    def ending(self, tail: str, importer: str) -> str | None:
        """The file that is ``tail`` or ends with it, nearest to the importer."""
        return nearest([path for path in self.named(basename(tail)) if path == tail or path.endswith("/" + tail)], importer)


def nearest(candidates: Iterable[str], importer: str) -> str | None:
    """The one that shares most folders with the importer; of several the shortest, then the first."""
    home = dirname(importer).split("/")

    def distance(path: str) -> tuple[int, int, str]:
        folders = dirname(path).split("/")
        shared = next((i for i, (one, other) in enumerate(zip(home, folders)) if one != other), min(len(home), len(folders)))
        return -shared, len(path), path

    return min(candidates, key=distance, default=None)
