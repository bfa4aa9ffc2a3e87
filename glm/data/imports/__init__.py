"""What each file of a repository imports from the same repository, by language.

Read from the text alone, without building anything: what a build file, a macro or a run-time path decides is not seen, and
such an import is no edge. A language is a file here with one class: ``Language(tree).imports(path)`` gives the paths the file
names, those it cannot place left out. Files of other languages import nothing.
"""

from glm.data.imports.c import C
from glm.data.imports.go import Go
from glm.data.imports.java import Java
from glm.data.imports.javascript import JavaScript
from glm.data.imports.python import Python
from glm.data.imports.rust import Rust
from glm.data.imports.tree import Tree, suffix

LANGUAGES = {
    Python: (".py", ".pyi"),
    JavaScript: (".js", ".jsx", ".mjs", ".cjs", ".ts", ".tsx", ".mts", ".cts", ".vue", ".svelte"),
    C: (".c", ".h", ".cc", ".hh", ".cpp", ".hpp", ".cxx", ".hxx", ".inl", ".cu", ".cuh", ".m", ".mm"),
    Go: (".go",),
    Java: (".java", ".kt", ".kts", ".scala"),
    Rust: (".rs",),
}
LANGUAGE_OF = {ending: language for language, endings in LANGUAGES.items() for ending in endings}


def imports(files: dict[str, str]) -> dict[str, list[str]]:
    """For each path (with slashes, relative to the repository) of ``files`` the other paths it imports, sorted."""
    tree = Tree(files)
    readers: dict[type, object] = {}
    found: dict[str, list[str]] = {}
    for path in files:
        language = LANGUAGE_OF.get(suffix(path))
        if language is None:
            found[path] = []
            continue
        if language not in readers:
            readers[language] = language(tree)
        found[path] = sorted(set(readers[language].imports(path)) - {path})
    return found
