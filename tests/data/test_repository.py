import ast
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm.data.imports import imports
from glm.data.imports.python import statements
from glm.data.repository import dependency_order, file_part, pieces_of_text, reading_order, repository_text

REPOSITORIES = {
    "python": ({
        "src/p/__init__.py": "from p.main import run\n", "src/p/main.py": "from . import low  # a\nimport os, p.mid as m\n",
        "src/p/mid.py": "from .low import (\n    x,  # y\n    z,\n)\nfrom p.sub.deep import \\\n    one\n", "src/p/low.py": "x = 1\n",
        "src/p/sub/__init__.py": "", "src/p/sub/deep.py": "from ..low import x\ndef f():\n    import p.main\n",
        "tests/test_main.py": "from p import main\nimport helper\n", "tests/helper.py": "", "other/helper.py": "", "other/low.py": "",
    }, {
        "src/p/__init__.py": ["src/p/main.py"], "src/p/main.py": ["src/p/low.py", "src/p/mid.py"],
        "src/p/mid.py": ["src/p/low.py", "src/p/sub/deep.py"], "src/p/sub/deep.py": ["src/p/low.py"],
        "tests/test_main.py": ["src/p/main.py", "tests/helper.py"],
    }),
    "javascript": ({
        "packages/a/package.json": '{"name": "@my/a"}', "packages/a/src/index.ts": "export * from './deep/b.js'\n",
        "packages/a/src/deep/b.ts": 'import x from "react"\nimport type { C } from "../c"\n', "packages/a/src/c.d.ts": "",
        "app.jsx": "const a = require('@my/a'), b = await import(`./lib`)\nimport './style.css'\n", "lib/index.js": "", "style.css": "",
    }, {
        "packages/a/src/index.ts": ["packages/a/src/deep/b.ts"], "packages/a/src/deep/b.ts": ["packages/a/src/c.d.ts"],
        "app.jsx": ["lib/index.js", "packages/a/src/index.ts", "style.css"],
    }),
    "c": ({
        "src/main.c": '#include <stdio.h>\n#  include "list.h"\n#include <lib/tree.h>\n', "src/list.h": "", "other/list.h": "",
        "include/lib/tree.h": '#include "base.h"\n', "src/deep/base.h": "", "test/stdio.h": "",
    }, {"src/main.c": ["include/lib/tree.h", "src/list.h"], "include/lib/tree.h": ["src/deep/base.h"]}),
    "go": ({
        "go.mod": "module example.com/x\n", "main.go": 'package main\nimport (\n\t"fmt"\n\tt "example.com/x/tree"\n)\n',
        "tree/a.go": 'import "example.com/x/tool/y"\n', "tree/b.go": "", "tree/b_test.go": "",
        "tool/go.mod": "module example.com/x/tool\n", "tool/y/y.go": "", "y/y.go": "",
    }, {"main.go": ["tree/a.go", "tree/b.go"], "tree/a.go": ["tool/y/y.go"]}),
    "java": ({
        "main/java/a/Main.java": "package a;\nimport a.b.Tree;\nimport static a.b.Text.join;\nimport a.c.*;\nimport java.util.List;\n",
        "main/java/a/b/Tree.java": "package a.b;\nimport a.c.Node;\n", "main/java/a/b/Text.kt": "package a.b\n",
        "main/java/a/c/Node.java": "package a.c;\n", "main/java/a/c/Leaf.java": "package a.c;\n",
    }, {
        "main/java/a/Main.java": ["main/java/a/b/Text.kt", "main/java/a/b/Tree.java", "main/java/a/c/Leaf.java", "main/java/a/c/Node.java"],
        "main/java/a/b/Tree.java": ["main/java/a/c/Node.java"],
    }),
    "rust": ({
        "core/Cargo.toml": '[package]\nname = "my-core"\n', "core/src/lib.rs": "pub mod tree;\nmod text;\nmod inner { }\n",
        "core/src/tree.rs": "use crate::text::{self, Text};\nuse std::fmt;\nmod leaf;\n", "core/src/tree/leaf.rs": "use super::super::text::Text;\n",
        "core/src/text/mod.rs": "", "app/Cargo.toml": '[package]\nversion = "1"\nname = "app"\n',
        "app/src/main.rs": "use my_core::{tree::{Tree, leaf as l}, text::*};\n",
    }, {
        "core/src/lib.rs": ["core/src/text/mod.rs", "core/src/tree.rs"], "core/src/tree.rs": ["core/src/text/mod.rs", "core/src/tree/leaf.rs"],
        "core/src/tree/leaf.rs": ["core/src/text/mod.rs"],
        "app/src/main.rs": ["core/src/text/mod.rs", "core/src/tree.rs", "core/src/tree/leaf.rs"],
    }),
}


@pytest.mark.parametrize("language", REPOSITORIES)
def test_imports_of_a_language_are_found_and_nothing_else(language):
    files, expected = REPOSITORIES[language]
    assert {path: found for path, found in imports(files).items() if found} == expected


@pytest.mark.parametrize("language", REPOSITORIES)
def test_a_file_comes_after_what_it_imports(language):
    files, expected = REPOSITORIES[language]
    order = dependency_order(files)
    assert sorted(order) == sorted(files)
    assert all(order.index(other) < order.index(path) for path, found in expected.items() for other in found)


def test_matched_python_imports_are_those_python_parses():
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for name in ("email", "asyncio", "json", "http", "unittest") for path in sorted((library / name).glob("*.py"))]
    for path in files:
        nodes = ast.parse(path.read_text()).body
        parsed = [(0, alias.name, []) for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        parsed += [
            (node.level, node.module or "", [alias.name for alias in node.names]) for node in nodes if isinstance(node, ast.ImportFrom)
        ]
        assert sorted(statements(path.read_text())) == sorted(parsed), path
    assert len(files) > 60


@given(st.dictionaries(st.integers(0, 30), st.sets(st.integers(0, 30), max_size=4), max_size=31))
def test_only_imports_inside_a_circle_are_ever_ignored(edges):
    files = {f"m{module}.py": "".join(f"import m{other}\n" for other in sorted(found)) for module, found in edges.items()}
    imported, order = imports(files), dependency_order(files)

    def reaches(start: str, goal: str) -> bool:
        seen, left = {start}, [start]
        while left:
            new = set(imported[left.pop()]) - seen
            seen, left = seen | new, [*left, *new]
        return goal in seen

    assert sorted(order) == sorted(files)
    for path, found in imported.items():
        assert all(order.index(other) < order.index(path) or reaches(other, path) for other in found)


def test_a_chain_of_imports_longer_than_pythons_stack_is_walked():
    files = {f"m{i:05}.py": f"import m{i + 1:05}\n" for i in range(5000)}
    assert dependency_order(files) == sorted(files, reverse=True)


def test_files_without_imports_come_in_path_order_and_beside_what_they_serve():
    files = {"a/x.zig": "", "a/z.py": "import b.y\n", "b/y.py": "", "a/y.zig": "", "b/x.py": ""}
    assert dependency_order(files) == ["a/x.zig", "a/y.zig", "b/y.py", "a/z.py", "b/x.py"]


def test_the_readme_stands_first_and_other_prose_last():
    files = {"setup.cfg": "", "README.md": "", "docs/a.md": "", "a.py": "import b", "b.py": "", "src/README.md": "", "CHANGES.txt": ""}
    assert reading_order(files) == ["README.md", "setup.cfg", "b.py", "a.py", "CHANGES.txt", "docs/a.md", "src/README.md"]
    assert repository_text("n", {"a.py": "import b\n\n\n", "b.py": "x"}) == "# repository: n\n# file: b.py\nx\n\n# file: a.py\nimport b\n\n"


@given(st.text("ab \n", max_size=300), st.integers(1, 9))
def test_pieces_of_a_long_file_are_the_file_and_end_at_line_ends(text, count):
    pieces = pieces_of_text(text, count)
    assert "".join(pieces) == text and all(pieces) and len(pieces) <= max(1, count)
    longest_line = max(map(len, text.split("\n")))
    if longest_line * count < len(text) // 2:
        assert all(piece.endswith("\n") for piece in pieces[:-1])


def test_parts_tokenized_one_by_one_are_the_tokens_of_the_document(tokenizer_folder):
    from glm.tokenizer.load import encode_text, encode_texts, load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    parts = [file_part(path.name, path.read_text()) for path in sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py"))]
    assert len(parts) > 3 and sum(encode_texts(tokenizer, parts), []) == encode_text(tokenizer, "".join(parts))
