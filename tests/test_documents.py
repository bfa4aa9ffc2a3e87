"""What the documents say of the tests is true: every test they name exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
DOCUMENTS = sorted(path for path in (ROOT / "docs").glob("*.md") if NAMED.search(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_a_document_names_exists(document):
    gone = []
    for file, test in NAMED.findall(document.read_text(encoding="utf-8")):
        path = ROOT / file
        tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        if not path.exists() or test and test not in defined:
            gone.append(f"{file}::{test}")
    assert not gone, gone
