"""Java, Kotlin, Scala: ``import a.b.C``, ``import static a.b.C.m``, ``import a.b.*``; use without an import is not seen."""

import re
from collections import defaultdict
from posixpath import basename

from glm.data.imports.tree import Tree, nearest

PACKAGE = re.compile(r"^[ \t]*package[ \t]+([\w.]+)", re.MULTILINE)
IMPORT = re.compile(r"^[ \t]*import[ \t]+(?:static[ \t]+)?([\w.]*\w)(\.\*)?", re.MULTILINE)


class Java:
    def __init__(self, tree: Tree):
        self.tree = tree
        self._classes: dict[str, list[str]] = defaultdict(list)
        self._packages: dict[str, list[str]] = defaultdict(list)
        for path in tree.of_language(".java", ".kt", ".scala"):
            declared = PACKAGE.search(tree.files[path])
            package = declared[1] if declared else ""
            self._classes[f"{package}.{basename(path).partition('.')[0]}".lstrip(".")].append(path)
            self._packages[package].append(path)

    def imports(self, path: str) -> list[str]:
        found = []
        for name, star in IMPORT.findall(self.tree.files[path]):
            if star or name.endswith("._"):
                found += self._packages.get(name.removesuffix("._"), [])
                continue
            outer = name.rpartition(".")[0]    # of a nested class or of a method
            found.append(nearest(self._classes.get(name) or self._classes.get(outer) or (), path))
        return [file for file in found if file]
