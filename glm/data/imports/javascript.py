"""JavaScript and TypeScript: ``import … from './a'``, ``export … from``, ``require('./a')``, ``import('./a')``.

Relative references, and packages of the same repository by the name in their package.json; path aliases of a tsconfig or a
bundler are not read.
"""

import json
import re
from posixpath import dirname

from glm.data.imports.tree import Tree

REFERENCE = re.compile(
    r"""(?:\bfrom\s*|\bimport\s*\(?\s*|\brequire\s*\(\s*)(?:"([^"\n]+)"|'([^'\n]+)'|`([^`\n$]+)`)"""
)
ENDINGS = (".ts", ".tsx", ".d.ts", ".js", ".jsx", ".mjs", ".cjs", ".mts", ".cts", ".vue", ".svelte", ".json")
WRITTEN_FOR = {".js": (".ts", ".tsx"), ".jsx": (".tsx",), ".mjs": (".mts",), ".cjs": (".cts",)}
"""TypeScript names the file that will be compiled from its source."""


class JavaScript:
    def __init__(self, tree: Tree):
        self.tree = tree
        self._packages: dict[str, str] = {}
        for path in tree.named("package.json"):
            try:
                name = json.loads(tree.files[path]).get("name")
            except (ValueError, AttributeError, RecursionError):
                continue
            if isinstance(name, str):
                self._packages.setdefault(name, dirname(path))

    def imports(self, path: str) -> list[str]:
        references = [next(filter(None, match.groups())) for match in REFERENCE.finditer(self.tree.files[path])]
        return [found for reference in references if (found := self._find(dirname(path), reference))]

    def _find(self, folder: str, reference: str) -> str | None:
        if reference.startswith("."):
            stem = self.tree.relative(folder, reference)
            return None if stem is None else self._module(stem)
        parts = reference.split("/")
        name = "/".join(parts[: 2 if reference.startswith("@") else 1])
        if name not in self._packages:
            return None
        home, inner = self._packages[name], reference[len(name) :].strip("/")
        stems = [inner, f"src/{inner}"] if inner else ["src", ""]
        return next(filter(None, (self._module(f"{home}/{stem}".strip("/")) for stem in stems)), None)

    def _module(self, stem: str) -> str | None:
        base, dot, ending = stem.rpartition(".")
        sources = [base + other for other in WRITTEN_FOR.get(dot + ending, ())]
        files = [stem + other for other in ENDINGS]
        return self.tree.first([stem, *sources, *files, *(f"{stem}/index{other}".lstrip("/") for other in ENDINGS)])
