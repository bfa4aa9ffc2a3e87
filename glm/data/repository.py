"""A repository as text: its files one after another, what is imported before what imports it.

    # repository: click
    # file: README.md
    …

    # file: src/click/_compat.py
    …

Order: the readme and the build files of the top folder, which say what the code is for and what it builds on; then the sources, imports
first; then the other documentation and text, which speak of the sources. Every part ends with an empty line, and the next begins
with ``#``: no token of GLM's kind of tokenizer reaches over that edge, so parts may be tokenized one by one and then joined.
"""

from posixpath import basename, dirname

from glm.data.imports import imports
from glm.data.imports.tree import suffix

BUILD_FILES = {
    "pyproject.toml", "setup.py", "setup.cfg", "package.json", "cargo.toml", "go.mod", "pom.xml", "build.gradle", "build.gradle.kts",
    "cmakelists.txt", "makefile",
}
PROSE = {".md", ".rst", ".txt", ".adoc", ".tex", ".org"}


def dependency_order(files: dict[str, str]) -> list[str]:
    """``files``: path in the repository -> text. The paths, imported files before those that import them, else by path.

    A circle of imports is cut where the walk in path order meets it again; only edges inside a circle are ever ignored.
    """
    imported = imports(files)
    ordered: list[str] = []
    visited: set[str] = set()
    for first in sorted(files):
        if first in visited:
            continue
        visited.add(first)
        walk = [(first, iter(imported[first]))]
        while walk:    # without recursion: chains of imports are longer than Python's stack
            path, rest = walk[-1]
            following = next((other for other in rest if other not in visited), None)
            if following is None:
                ordered.append(path)
                walk.pop()
            else:
                visited.add(following)
                walk.append((following, iter(imported[following])))
    return ordered


def reading_order(files: dict[str, str]) -> list[str]:
    """All paths in the order in which a document shows them."""
    front = sorted((path for path in files if _front(path) is not None), key=lambda path: (_front(path), path))
    rest = {path: text for path, text in files.items() if _front(path) is None}
    sources = dependency_order({path: text for path, text in rest.items() if suffix(path) not in PROSE})
    prose = sorted(path for path in rest if suffix(path) in PROSE)
    return [*front, *sources, *prose]


def _front(path: str) -> int | None:
    """0 for a readme, 1 for a build file, of the top folder; None for others."""
    if dirname(path):
        return None
    name = basename(path).lower()
    if name.startswith("readme"):
        return 0
    return 1 if name in BUILD_FILES else None


def heading(name: str, part: int = 1) -> str:
    return f"# repository: {name}\n" if part == 1 else f"# repository: {name}, part {part}\n"


def file_part(path: str, text: str, note: str = "") -> str:
    """``note`` follows the path in its header."""
    return f"# file: {path}{f' ({note})' if note else ''}\n{text.rstrip()}\n\n"


def repository_text(name: str, files: dict[str, str]) -> str:
    """The whole repository as one document."""
    return heading(name) + "".join(file_part(path, files[path]) for path in reading_order(files))


def pieces_of_text(text: str, count: int) -> list[str]:
    """``text`` in about ``count`` pieces of like length, cut at line ends; inside a line only where a line is longer than a piece."""
    pieces, start = [], 0
    for index in range(1, count + 1):
        target = len(text) * index // count
        end = len(text) if index == count else text.find("\n", target) + 1
        if end == 0 or end > len(text) * (index + 1) // count:
            end = text.rfind("\n", start, target) + 1 or target
        if end > start:
            pieces.append(text[start:end])
            start = end
    return pieces
