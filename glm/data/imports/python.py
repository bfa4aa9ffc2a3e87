"""Python: ``import a.b``, ``from .a import b`` at the left edge.

Indented imports stand in functions, under ``try`` or ``TYPE_CHECKING``: they are mostly there to break a circle, so they are no
edges. The lines are matched, not parsed: fifty times faster, and templates and Python 2 are read too.
"""

import re
from collections import defaultdict
from posixpath import dirname

from glm.data.imports.tree import Tree, ancestors, nearest

SOURCE_FOLDERS = ("src", "lib", "python")
STATEMENT = re.compile(
    r"^(?:from[ \t]+(\.*)([\w.]*)[ \t]+import[ \t]*(?:\(([^)]*)\)|((?:[^\n#\\]|\\\n)*))|import[ \t]+((?:[^\n#\\;]|\\\n)+))", re.MULTILINE
)
COMMENT = re.compile(r"#[^\n]*")


class Python:
    """A file has a name below its outermost package (the last folder with an ``__init__.py``), below the repository and below
    the usual source folders. A name that several files have means the one nearest to the importer."""

    def __init__(self, tree: Tree):
        self.tree = tree
        self._files_of: dict[str, list[str]] = defaultdict(list)
        packages = {dirname(path) for path in tree.named("__init__.py")}
        for path in tree.of_language(".py", ".pyi"):
            root = next(folder for folder in ancestors(dirname(path)) if folder not in packages or not folder)
            for base in {root, "", *(folder for folder in SOURCE_FOLDERS if path.startswith(folder + "/"))}:
                self._files_of[_module(path, base)].append(path)

    def imports(self, path: str) -> list[str]:
        found = []
        for level, module, names in statements(self.tree.files[path]):
            folder = dirname(path)
            for _ in range(level - 1):
                folder = dirname(folder)
            folder = folder if level else None
            inside = [self._find(path, folder, f"{module}.{name}" if module else name) for name in names]
            found += inside
            if not names or not all(inside):    # a name that is no module of its own stands in the module it is taken from
                found.append(self._find(path, folder, module))
        return [file for file in found if file]

    def _find(self, importer: str, folder: str | None, module: str) -> str | None:
        """``folder``: of a relative import."""
        if folder is None:
            return nearest((file for file in self._files_of.get(module, ()) if file != importer), importer)
        stem = f"{folder}/{module.replace('.', '/')}".strip("/")
        return self.tree.first([f"{stem}/__init__.py".lstrip("/"), f"{stem}.py", f"{stem}.pyi"])


def _module(path: str, root: str) -> str:
    inner = path[len(root) + 1 :] if root else path
    return inner.rpartition(".")[0].removesuffix("/__init__").replace("/", ".")


def statements(source: str) -> list[tuple[int, str, list[str]]]:
    """(dots, module, names) of each import at the left edge."""
    found: list[tuple[int, str, list[str]]] = []
    for dots, module, inside, plain, modules in STATEMENT.findall(source):
        if modules:
            found += [(0, name, []) for name in _names(modules)]
        else:
            found.append((len(dots), module, _names(COMMENT.sub("", inside) or plain.partition(";")[0])))
    return found


def _names(listed: str) -> list[str]:
    """``a as b, c`` -> a, c."""
    return [words[0] for part in listed.replace("\\\n", " ").split(",") if (words := part.split())]
