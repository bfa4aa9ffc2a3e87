"""C, C++, CUDA, Objective-C: ``#include "a.h"``, ``#include <a.h>``, ``#import``."""

import re
from posixpath import dirname

from glm.data.imports.tree import Tree, nearest

INCLUDE = re.compile(r'^[ \t]*#[ \t]*(?:include|import)[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>)', re.MULTILINE)


class C:
    """A quoted name is looked up beside the file, then anywhere; one in angle brackets at the root or below an include folder,
    so that ``<string.h>`` is not taken for a file deep in the repository that happens to be called so."""

    def __init__(self, tree: Tree):
        self.tree = tree

    def imports(self, path: str) -> list[str]:
        found = []
        for quoted, angled in INCLUDE.findall(self.tree.files[path]):
            if quoted:
                beside = self.tree.relative(dirname(path), quoted)
                found.append(beside if beside in self.tree.files else self.tree.ending(quoted.lstrip("./"), path))
            else:
                named = self.tree.named(angled.rpartition("/")[2])
                found.append(nearest((file for file in named if file == angled or file.endswith(f"include/{angled}")), path))
        return [file for file in found if file]
