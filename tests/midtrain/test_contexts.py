import json
from collections import Counter

import numpy as np
import pytest

from glm.errors import DataError
from midtrain.checkout import open_checkout, read_files
from midtrain.contexts import Contexts
from midtrain.discussions import read_discussions
from midtrain.repository import file_documents

END = np.array([799], dtype=np.uint32)
PEOPLE = {"author": {"login": "ann"}}
RECORDS = [
    {"number": 1, "title": "It subtracts", "body": "add(1, 2) is -1<!-- fill this in -->", **PEOPLE,
     "comments": [{"author": {"login": "bob"}, "body": "Really?"}, {"author": {"login": "ann"}, "body": "Yes."},
                  {"author": {"login": "stale[bot]"}, "body": "This is old."}]},
    {"number": 2, "title": "Add", "body": "Fixes #1", **PEOPLE, "pull_request": {"url": "x"}, "comments": 3},
    {"number": 3, "title": "Divide?", "body": "Please.", "user": {"login": "eve"}, "comments": []},
    {"number": 4, "title": "Multiply", "body": "", "headRefName": "m", "comments": [], "closingIssuesReferences": []},
    {"number": 5, "title": "Lost", "body": "Never merged", "headRefName": "l", "mergeCommit": None},
    {"number": 6, "title": "Bump x", "body": "automatic", "author": {"login": "renovate[bot]"}},
]


@pytest.fixture
def discussions(tmp_path):
    path = tmp_path / "discussions" / "calculator.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def told(story, discussions, tokenizer, encode, *, commits=100, capacity=4000):
    """{label: text} of the contexts, and the counts."""
    dropped, left_out = Counter(), Counter()
    checkout = open_checkout("calculator", story.folder, history=True)
    read = read_discussions(discussions, left_out) if discussions else {}
    contexts = Contexts(checkout, read, encode, END, capacity, dropped, left_out)
    drafts = list(contexts.documents(commits))
    assert all(len(draft.ids) <= capacity and draft.ids[-1] == END[0] for draft in drafts)
    return {draft.label.removeprefix("calculator, "): tokenizer.decode(draft.ids[:-1]) for draft in drafts}, dropped, left_out


def test_a_pull_request_is_told_with_the_files_before_it_its_issue_and_its_change(story, discussions, tokenizer, encode):
    texts, _, _ = told(story, discussions, tokenizer, encode)
    text = texts["pull request 2"]
    places = [text.index(part) for part in (
        "# repository: calculator\n", "# file: src/calculator/add.py (before the change)\ndef add(a, b):\n    return a - b\n",
        "# issue 1: It subtracts\nadd(1, 2) is -1\n\n", "# comment by user 1\nReally?\n\n# comment by author\nYes.\n\n",
        "# pull request 2: Add\nFixes #1\n\n", "# change\ndiff --git a/src/calculator/add.py", "-    return a - b\n+    return a + b\n",
    )]
    assert places == sorted(places)
    assert "poetry.lock" not in text and "index " not in text and "ann" not in text and "stale" not in text


def test_a_squashed_pull_request_is_found_by_its_commits_message(story, discussions, tokenizer, encode):
    texts, _, _ = told(story, discussions, tokenizer, encode)
    assert "+def multiply(a, b):" in texts["pull request 4"] and "before the change" not in texts["pull request 4"]


def test_every_issue_and_commit_is_told_once(story, discussions, tokenizer, encode):
    texts, dropped, left_out = told(story, discussions, tokenizer, encode)
    assert [label.split()[0] for label in texts] == ["pull", "pull", "issue", "commit", "commit"]
    assert "issue 3" in texts    # issue 1 is told by its pull request
    commits = "".join(text for label, text in texts.items() if label.startswith("commit"))
    assert "# commit: Say what it does\n\nIn more words.\n\ndiff --git a/README.md" in commits and "# commit: Begin\n\ndiff" in commits
    assert "Signed-off-by" not in commits and "Somebody" not in commits
    assert dropped == {
        "pull request without its commit here": 1, "commit told by its pull request": 3, "commit by a program": 1,
        "commit without source in its change": 1,
    }
    assert left_out["discussion by a program"] == 1 and left_out["comment by a program"] == 1 and left_out["lock file"] == 3


def test_without_discussions_every_commit_stands_alone_newest_first(story, tokenizer, encode):
    texts, dropped, _ = told(story, None, tokenizer, encode)
    assert len(texts) == 4 and dropped["merge"] == 1
    assert len(told(story, None, tokenizer, encode, commits=2)[0]) == 1    # of the two newest one changes only a lock file


def test_what_does_not_fit_is_left_out_whole_the_files_first(story, discussions, tokenizer, encode):
    whole = len(encode([told(story, discussions, tokenizer, encode)[0]["pull request 2"]])[0]) + 1
    texts, _, left_out = told(story, discussions, tokenizer, encode, capacity=whole - 1)
    assert "before the change" not in texts["pull request 2"] and "# issue 1" in texts["pull request 2"]
    assert left_out["file or issue that did not fit beside its pull request"] == 1
    assert told(story, discussions, tokenizer, encode, capacity=60)[1]["commit longer than a document"] == 4


def test_issues_and_commits_of_a_dropped_pull_request_stand_alone(story, discussions, tokenizer, encode):
    records = [record | {"body": "It was long ago. " * 400} if record["number"] == 2 else record for record in RECORDS]
    records[1] |= {"title": "Fix #1"}
    discussions.write_text("".join(json.dumps(record) + "\n" for record in records))
    texts, dropped, _ = told(story, discussions, tokenizer, encode, capacity=1000)
    assert "pull request 2" not in texts and "issue 1" in texts and dropped["pull request longer than a document"] == 1
    assert any("# commit: Add instead of subtract" in text for text in texts.values()) and dropped["merge"] == 1
    assert dropped["commit told by its pull request"] == 1    # of the other request


def test_odd_settings_of_the_user_change_nothing(story, discussions, tokenizer, encode):
    before = told(story, discussions, tokenizer, encode)
    for key, value in (("diff.noprefix", "true"), ("diff.mnemonicPrefix", "true"), ("color.ui", "always"), ("log.showSignature", "true"),
                       ("diff.external", "false"), ("core.quotePath", "true"), ("log.date", "relative"), ("diff.renames", "copies")):
        story.git("config", key, value)
    assert told(story, discussions, tokenizer, encode) == before


def test_a_removed_and_a_renamed_file_are_told_by_their_paths(repository, tokenizer, encode):
    repository.commit("one", {"a.py": "a = 1\n" * 30, "b.py": "b = 1\n"})
    repository.git("mv", "a.py", "c.py")
    repository.commit("two", {"b.py": None})
    text = next(iter(told(repository, None, tokenizer, encode, commits=1)[0].values()))
    assert "rename from a.py\nrename to c.py\n" in text and "deleted file mode" in text and "--- a/b.py\n+++ /dev/null" in text


@pytest.mark.parametrize(("line", "words"), [
    ("{", "not JSON"), ('{"title": "x"}', "keys title"), ("[1]", "a list"), ('{"number": "1", "title": "x"}', "keys number, title"),
])
def test_a_line_that_is_no_discussion_is_named(tmp_path, line, words):
    (tmp_path / "x.jsonl").write_text('{"number": 1, "title": "fine", "body": "x"}\n' + line)
    with pytest.raises(DataError, match=f"line 2(.|\n)*{words}(.|\n)*gh issue list"):
        read_discussions(tmp_path / "x.jsonl", Counter())


def documents_of(files, tokenizer, encode, capacity):
    counted = Counter()
    drafts = list(file_documents("n", files, encode, END, capacity, counted))
    assert all(len(draft.ids) <= capacity and draft.ids[-1] == END[0] for draft in drafts)
    return [tokenizer.decode(draft.ids[:-1]) for draft in drafts], counted


def test_a_repository_is_cut_between_files_and_every_file_that_fits_is_whole(story, tokenizer, encode):
    files = read_files(open_checkout("n", story.folder, history=False), 10**6, Counter())
    (whole,), counted = documents_of(files, tokenizer, encode, 4000)
    assert whole.startswith("# repository: n\n# file: README.md\n") and not counted
    assert whole.index("# file: src/calculator/add.py") < whole.index("# file: src/calculator/main.py") < whole.index("__init__.py")
    parts, counted = documents_of(files, tokenizer, encode, 80)
    assert len(parts) > 2 and not counted and parts[1].startswith("# repository: n, part 2\n# file: ")
    body = "".join(part.partition("\n")[2] for part in parts)
    assert body == whole.partition("\n")[2]    # nothing lost, nothing twice, the same order


def test_a_file_longer_than_a_document_is_cut_at_line_ends_and_told_as_pieces(tokenizer, encode):
    long = "".join(f"line_{i} = {i}\n" for i in range(200))
    parts, counted = documents_of({"a.py": "import b\n", "b.py": long, "c.py": "c = 1\n"}, tokenizer, encode, 120)
    pieces = [part for part in parts if "# file: b.py (piece" in part]
    assert counted == {"file longer than a document, cut": 1} and len(pieces) == len(parts) - 1
    assert "".join(piece.split(")\n", 1)[1].rstrip("\n") + "\n" for piece in pieces) == long
    assert parts[-1].endswith("# file: a.py\nimport b\n\n# file: c.py\nc = 1\n\n")
