"""Go: a package is a folder; ``import "module/folder"`` means its files, tests not."""

import re
from posixpath import dirname

from glm.data.imports.tree import Tree

MODULE = re.compile(r"^module[ \t]+(\S+)", re.MULTILINE)
ONE = re.compile(r'^import[ \t]+(?:[\w.]+[ \t]+)?"([^"\n]+)"', re.MULTILINE)
BLOCK = re.compile(r"^import[ \t]*\(([^)]*)\)", re.MULTILINE)
QUOTED = re.compile(r'^[ \t]*(?:[\w.]+[ \t]+)?"([^"\n]+)"', re.MULTILINE)


class Go:
    def __init__(self, tree: Tree):
        self.tree = tree
        modules = ((MODULE.search(tree.files[path]), dirname(path)) for path in tree.named("go.mod"))
        self._modules = sorted(((match[1].strip('"'), folder) for match, folder in modules if match), key=lambda one: -len(one[0]))

    def imports(self, path: str) -> list[str]:
        text = self.tree.files[path]
        references = ONE.findall(text) + [name for block in BLOCK.findall(text) for name in QUOTED.findall(block)]
        return [file for reference in references for file in self._package(reference)]

    def _package(self, reference: str) -> list[str]:
        for module, home in self._modules:    # the longest name first: a module inside another is the nearer one
            if reference == module or reference.startswith(module + "/"):
                folder = f"{home}/{reference[len(module) + 1 :]}".strip("/")
                return [file for file in self.tree.inside.get(folder, ()) if file.endswith(".go") and not file.endswith("_test.go")]
        return []
