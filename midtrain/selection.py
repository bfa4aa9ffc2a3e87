"""Which files of a repository are worth reading: a reason to leave one out, or none."""

import re
from posixpath import basename

from glm.data.imports.tree import suffix

VENDORED = {
    "vendor", "vendored", "_vendor", "third_party", "third-party", "thirdparty", "external", "extern", "node_modules", "bower_components",
    "site-packages", "venv", ".venv", "pods", "carthage",
}
BUILT = {"dist", "__pycache__", ".next", ".tox", ".eggs", "coverage"}
LOCKS = {
    "package-lock.json", "npm-shrinkwrap.json", "yarn.lock", "pnpm-lock.yaml", "bun.lockb", "poetry.lock", "pipfile.lock", "uv.lock", "pdm.lock",
    "cargo.lock", "go.sum", "gemfile.lock", "composer.lock", "mix.lock", "flake.lock", "packages.lock.json", "gradle.lockfile", "podfile.lock",
}
GENERATED_NAME = re.compile(
    r"(\.min\.(js|css)|[._-]pb2?(_grpc)?\.(go|py|cc|h|js|ts)|\.generated\.\w+|_generated\.\w+|\.g\.(dart|cs)|\.map|\.snap)$"
)
GENERATED_TEXT = re.compile(rb"@generated|do not (?:edit|modify)[^\n]*generated|generated[^\n]*do not (?:edit|modify)", re.IGNORECASE)
DATA = {".csv", ".tsv", ".svg", ".json", ".jsonl", ".ipynb", ".xml", ".po", ".pot", ".sql", ".lst", ".log", ".geojson", ".ndjson"}
LARGEST_DATA_BYTES = 32_768
"""Tables and the like above this are data, not text; a small one is configuration."""
LONGEST_MEAN_LINE, LONGEST_LINE = 300, 20_000
"""Above these a file is minified or holds data."""
LARGE_FILE_POINTER = b"version https://git-lfs.github.com/spec/"
HEAD_BYTES = 1024


def reason_of_path(path: str) -> str | None:
    """Why a path (with slashes, relative to its repository) is left out whatever it holds."""
    folders = {part.lower() for part in path.split("/")[:-1]}
    name = basename(path).lower()
    if folders & VENDORED:
        return "vendored"
    if folders & BUILT or GENERATED_NAME.search(name):
        return "generated"
    return "lock file" if name in LOCKS else None


def reason_of_size(path: str, size: int, largest: int) -> str | None:
    if size == 0:
        return "empty"
    if suffix(path) in DATA and size > LARGEST_DATA_BYTES:
        return "data"
    return "large" if size > largest else None


def reason_of_content(data: bytes) -> str | None:
    head = data[:HEAD_BYTES]
    if b"\0" in data[:8192]:
        return "binary"
    if head.startswith(LARGE_FILE_POINTER):
        return "large file pointer"
    try:
        data.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    if not data.strip():
        return "empty"
    if GENERATED_TEXT.search(head):
        return "generated"
    lines = data.split(b"\n")
    return "long lines" if len(data) > LONGEST_MEAN_LINE * len(lines) or max(map(len, lines)) > LONGEST_LINE else None


def text_of(data: bytes) -> str:
    """What ``reason_of_content`` let pass, its line ends made one kind."""
    return data.decode().removeprefix("\ufeff").replace("\r\n", "\n")
