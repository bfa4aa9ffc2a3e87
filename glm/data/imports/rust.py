"""Rust: ``mod a;``, ``use crate::a::b``, ``use self::a``, ``use super::a``, and crates of the same repository by name."""

import re
from posixpath import basename, dirname

from glm.data.imports.tree import Tree, ancestors

MODULE = re.compile(r"^[ \t]*(?:pub(?:\([^)]*\))?[ \t]+)?mod[ \t]+(\w+)[ \t]*;", re.MULTILINE)
USE = re.compile(r"^[ \t]*(?:pub(?:\([^)]*\))?[ \t]+)?use[ \t]+([^;]+);", re.MULTILINE)
CRATE = re.compile(r'^\[package\][^\[]*?^name[ \t]*=[ \t]*"([^"\n]+)"', re.MULTILINE | re.DOTALL)
ROOTS = ("lib.rs", "main.rs")


class Rust:
    def __init__(self, tree: Tree):
        self.tree = tree
        self._crates: dict[str, str] = {}
        self._manifests = {dirname(path) for path in tree.named("Cargo.toml")}
        for path in tree.named("Cargo.toml"):
            if match := CRATE.search(tree.files[path]):
                self._crates.setdefault(match[1].replace("-", "_"), dirname(path))

    def imports(self, path: str) -> list[str]:
        text = self.tree.files[path]
        own = _module_folder(path)
        found = [self._module(own, [name]) for name in MODULE.findall(text)]
        for tree in USE.findall(text):
            for names in _paths(tree):
                found.append(self._use(path, own, names))
        return [file for file in found if file]

    def _use(self, path: str, own: str, names: list[str]) -> str | None:
        head, rest = names[0], names[1:]
        if head == "crate":
            return self._module(self._source(self._crate_of(path)), rest)
        if head == "self":
            return self._module(own, rest)
        if head == "super":
            folder = dirname(own)
            while rest[:1] == ["super"]:
                folder, rest = dirname(folder), rest[1:]
            return self._module(folder, rest)
        if head in self._crates:
            source = self._source(self._crates[head])
            return self._module(source, rest) or self.tree.first([f"{source}/lib.rs".lstrip("/")])
        return None

    def _crate_of(self, path: str) -> str:
        return next((folder for folder in ancestors(dirname(path)) if folder in self._manifests), "")

    def _source(self, crate: str) -> str:
        """The folder of a crate's root module."""
        source = f"{crate}/src".lstrip("/")
        return source if any(f"{source}/{root}" in self.tree.files for root in ROOTS) else crate

    def _module(self, folder: str, names: list[str]) -> str | None:
        """The file of the longest beginning of ``names`` that is a module below ``folder``; the rest are things in it."""
        for count in range(len(names), 0, -1):
            stem = "/".join(filter(None, [folder, *names[:count]]))
            if found := self.tree.first([f"{stem}.rs", f"{stem}/mod.rs"]):
                return found
        return None


def _module_folder(path: str) -> str:
    """Where the modules a file declares lie."""
    return dirname(path) if basename(path) in (*ROOTS, "mod.rs", "build.rs") else path.removesuffix(".rs")


def _paths(use: str) -> list[list[str]]:
    """``a::{b, c::d as e}`` -> [[a, b], [a, c, d]]."""
    found, prefix, stack = [], [], []
    for token in re.findall(r"\w+|::|[{},*]", re.sub(r"\bas\s+\w+|//[^\n]*", "", use)):
        if token == "{":
            stack.append(list(prefix))
        elif token in (",", "}"):
            if prefix and (not stack or prefix != stack[-1]):
                found.append(prefix)
            prefix = list(stack[-1]) if stack else []
            if token == "}" and stack:
                stack.pop()
                prefix = []
        elif token not in ("::", "*"):
            prefix.append(token)
    return [names for names in [*found, prefix] if names]
