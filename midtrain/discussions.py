"""Issues and pull requests, as GitHub's API or ``gh issue list --json`` / ``gh pr list --json`` gives them, one JSON object a line.

Read: number, title, body, comments (a list of {author or user: {login}, body}; a bare count has nothing to read). A record
is a pull request if it has ``pull_request``, ``mergeCommit``, ``merge_commit_sha``, ``headRefName`` or ``head``. Its commit is
``mergeCommit.oid`` or ``merge_commit_sha``, its issues ``closingIssuesReferences`` and what its text says it closes.
People become ``author`` and ``user 1``, ``user 2`` …; what programs wrote is left out.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glm.errors import DataError
from midtrain.history import BOT

PULL_REQUEST_KEYS = ("pull_request", "mergeCommit", "merge_commit_sha", "headRefName", "head")
CLOSES = re.compile(r"\b(?:close[sd]?|fix(?:e[sd])?|resolve[sd]?):?\s+#(\d+)\b", re.IGNORECASE)
EXPECTED = "one JSON object a line with number and title, as `gh issue list --json number,title,body,comments` writes"
HIDDEN_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


@dataclass(frozen=True)
class Discussion:
    number: int
    title: str
    body: str
    comments: tuple[tuple[str, str], ...]
    """(who, text)"""
    is_pull_request: bool
    merge_commit: str | None
    closes: tuple[int, ...]

    @property
    def text(self) -> str:
        kind = "pull request" if self.is_pull_request else "issue"
        parts = [f"# {kind} {self.number}: {self.title}\n{self.body}".rstrip() + "\n\n"]
        parts += [f"# comment by {who}\n{text}\n\n" for who, text in self.comments]
        return "".join(parts)


def read_discussions(path: Path, left_out: Counter) -> dict[int, Discussion]:
    """By number. Raises DataError for a line that is not such a record."""
    found: dict[int, Discussion] = {}
    for where, record in _records(path):
        discussion = _discussion(where, record, left_out)
        if discussion is None:
            left_out["discussion by a program"] += 1
        elif not discussion.body and not discussion.comments and not discussion.is_pull_request:
            left_out["issue without text"] += 1
        else:
            found[discussion.number] = discussion
    return found


def _records(path: Path) -> Iterator[tuple[str, dict]]:
    todo = "correct or remove the line"
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if not raw.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(raw.decode())
            except (ValueError, RecursionError) as error:
                raise DataError(where, f"not JSON in UTF-8: {error}", EXPECTED, todo) from error
            if not isinstance(record, dict) or not isinstance(record.get("number"), int) or not isinstance(record.get("title"), str):
                found = f"keys {', '.join(sorted(record))}" if isinstance(record, dict) else f"a {type(record).__name__}"
                raise DataError(where, found, EXPECTED, todo)
            yield where, record


def _discussion(where: str, record: dict, left_out: Counter) -> Discussion | None:
    """None for one that a program opened."""
    opener = _login(record)
    if BOT.search(opener):
        return None
    names = {opener: "author"}
    comments = []
    listed = record.get("comments")
    for comment in listed if isinstance(listed, list) else []:
        login, text = _login(comment), _text(comment.get("body"))
        if BOT.search(login):
            left_out["comment by a program"] += 1
        elif text:
            comments.append((names.setdefault(login, f"user {len(names)}"), text))
    body = _text(record.get("body"))
    merge = record.get("mergeCommit")
    merge_commit = merge.get("oid") if isinstance(merge, dict) else record.get("merge_commit_sha")
    listed = record.get("closingIssuesReferences")
    closes = [issue["number"] for issue in listed if "number" in issue] if isinstance(listed, list) else []
    closes += [int(number) for number in CLOSES.findall(f"{record['title']}\n{body}")]
    is_pull_request = any(record.get(key) for key in PULL_REQUEST_KEYS)
    return Discussion(
        record["number"], record["title"].strip(), body, tuple(comments), is_pull_request, merge_commit,
        tuple(dict.fromkeys(closes)) if is_pull_request else (),
    )


def _login(record: dict) -> str:
    """Who wrote it; an empty string where nobody is named."""
    person = record.get("author") or record.get("user")
    return str(person.get("login", "")) if isinstance(person, dict) else ""


def _text(body: object) -> str:
    """GitHub's templates hide their instructions in HTML comments."""
    return HIDDEN_COMMENT.sub("", body).replace("\r\n", "\n").strip() if isinstance(body, str) else ""
