"""The corpora every machine has: texts and sources of the running Python installation.

prose         the language reference kept by pydoc, then readmes, descriptions and licences of installed packages, then docstrings
code          the standard library's stand-alone modules
repositories  the standard library's packages, all files of one as one document, imported files before their importers

The three share no file, so a document held out of one is not met in another.
"""

import ast
import importlib.metadata
import pkgutil
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from glm.data.repository import repository_text

NOT_SOURCE = {"test", "tests", "idle_test", "__pycache__", "site-packages"}
NOT_REPOSITORIES = {"idlelib", "pydoc_data", "encodings"}
"""pydoc_data is prose already; encodings is mostly tables of characters."""
LARGEST_FILE_BYTES = 300_000
SHORTEST_DOCSTRING = 200
LICENCE = re.compile(r"(licen[cs]e|copying|notice)", re.IGNORECASE)


def _read(path: Path) -> str | None:
    """The text, or None where an installed file is not UTF-8 or is very large; nobody can act on such a one."""
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            return None
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except (UnicodeDecodeError, OSError):
        return None


def _python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if not NOT_SOURCE & set(path.relative_to(folder).parts))


def _language_reference() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"pydoc {name}", topics[name]


def _package_texts(packages: Path) -> Iterator[tuple[str, str]]:
    """Readmes, descriptions and licences; the order mixes packages, the same on every call."""
    found = []
    for path in packages.rglob("*"):
        is_text = path.suffix in {".md", ".rst"} or path.name == "METADATA" or bool(LICENCE.match(path.name))
        if is_text and path.suffix not in {".py", ".pyc", ".so"} and path.is_file():
            found.append(path)
    found.sort()
    random.Random(0).shuffle(found)
    for path in found:
        text = _read(path)
        if text is None:
            continue
        if path.name == "METADATA":  # a header of key: value lines, a blank line, then the description
            text = text.partition("\n\n")[2]
        yield str(path.relative_to(packages)), text


def _docstrings(packages: Path) -> Iterator[tuple[str, str]]:
    """All long docstrings of one file as one document."""
    files = _python_files(packages)
    random.Random(0).shuffle(files)
    for path in files:
        source = _read(path)
        if source is None or source.count('"""') < 4:
            continue
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):  # templates of source files
            continue
        owners = (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
        texts = [text for text in map(ast.get_docstring, owners) if text and len(text) >= SHORTEST_DOCSTRING]
        if texts:
            yield f"docstrings of {path.relative_to(packages)}", "\n\n".join(texts)


def installed_packages() -> list[str]:
    """``name==version`` of the packages whose texts ``prose`` reads, sorted."""
    return sorted(
        f"{package.name}=={package.version}" for package in importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
    )


def prose() -> Iterator[tuple[str, str]]:
    packages = Path(sysconfig.get_path("purelib"))
    yield from _language_reference()
    yield from _package_texts(packages)
    yield from _docstrings(packages)


def code() -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_path("stdlib"))
    modules = sorted(library.glob("*.py"))
    random.Random(0).shuffle(modules)
    for path in modules:
        text = _read(path)
        if text:
            yield path.name, text


def package_folders() -> list[Path]:
    """The standard library's packages."""
    library = Path(sysconfig.get_path("stdlib"))
    names = sorted(
        entry.name for entry in pkgutil.iter_modules([str(library)])
        if entry.ispkg and entry.name not in NOT_SOURCE | NOT_REPOSITORIES
    )
    return [library / name for name in names]


def repositories() -> Iterator[tuple[str, str]]:
    for folder in package_folders():
        texts = {path.relative_to(folder.parent).as_posix(): _read(path) for path in _python_files(folder)}
        sources = {path: text for path, text in texts.items() if text}
        if sources:
            yield folder.name, repository_text(folder.name, sources)
