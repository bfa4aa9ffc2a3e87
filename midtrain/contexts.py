"""Issues, pull requests and commits as documents: what belongs together stands in one.

pull_requests  the touched files as they were, the issues it closes, its discussion, its change
issues         an issue that no pull request told here closes, with its discussion
commits        message and change of a commit that belongs to no pull request told here
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from glm.data.repository import file_part, heading
from midtrain.checkout import Checkout, git, read_objects
from midtrain.discussions import Discussion
from midtrain.document import Draft, Encode, joined
from midtrain.history import Change, Commit, change_between, changes, commits, path_before
from midtrain.selection import reason_of_content, text_of


class Contexts:
    """``capacity``: most tokens of a document, ``end`` included. What is dropped and left out of diffs is counted."""

    def __init__(self, checkout: Checkout, discussions: dict[int, Discussion], encode: Encode, end: np.ndarray, capacity: int,
                 dropped: Counter, left_out: Counter):
        self.checkout, self.discussions, self.encode, self.end = checkout, discussions, encode, end
        self.dropped, self.left_out = dropped, left_out
        self._head = encode([heading(checkout.name)])[0]
        self._room = capacity - len(end) - len(self._head)
        self.history = commits(checkout)

    def documents(self, most_commits: int) -> Iterator[Draft]:
        """``most_commits``: the newest so many that stand alone."""
        ids = {commit.id: commit for commit in self.history}
        by_number: dict[int, Commit] = {}
        for commit in self.history:
            if commit.pull_request is not None:
                by_number.setdefault(commit.pull_request, commit)
        told, closed = set(), set()
        for number, discussion in sorted(self.discussions.items()):
            if discussion.is_pull_request:
                commit = ids.get(discussion.merge_commit or "") or by_number.get(number)
                if commit is None or not commit.parents:
                    self.dropped["pull request without its commit here"] += 1
                    continue
                draft = self._pull_request(discussion, commit)
                if draft is not None:    # of a dropped one, issues and commits stand alone
                    told |= self._own_commits(commit)
                    closed |= set(discussion.closes)
                    yield draft
        for number, discussion in sorted(self.discussions.items()):
            if not discussion.is_pull_request and number not in closed:
                yield from self._issue(discussion)
        yield from self._commits(told, most_commits)

    def _own_commits(self, commit: Commit) -> set[str]:
        """A merge brings the commits of its branch."""
        if len(commit.parents) < 2:
            return {commit.id}
        return set(git(self.checkout.git_dir, "rev-list", commit.id, f"^{commit.parents[0]}").decode().split())

    def _pull_request(self, discussion: Discussion, commit: Commit) -> Draft | None:
        change = change_between(self.checkout, commit.parents[0], commit.id, self.left_out)
        if not change.files:
            self.dropped["pull request without source in its change"] += 1
            return None
        issues = [issue for number in discussion.closes if (issue := self.discussions.get(number)) and not issue.is_pull_request]
        files = self._files_before(commit.parents[0], change)
        texts = [*files, *(issue.text for issue in issues), f"{discussion.text}# change\n{change.text}\n"]
        encoded = self.encode(texts)
        room = self._room - len(encoded[-1])
        if room < 0:
            self.dropped["pull request longer than a document"] += 1
            return None
        chosen = {len(texts) - 1}
        for index in [*range(len(files), len(texts) - 1), *range(len(files))]:    # issues before files, if not all fits
            if len(encoded[index]) <= room:
                room -= len(encoded[index])
                chosen.add(index)
            else:
                self.left_out["file or issue that did not fit beside its pull request"] += 1
        return self._draft("pull_requests", f"pull request {discussion.number}", [encoded[index] for index in sorted(chosen)])

    def _files_before(self, base: str, change: Change) -> list[str]:
        paths = [path for _, diff in change.files if (path := path_before(diff)) and "\n" not in path]
        contents = read_objects(self.checkout.git_dir, [f"{base}:{path}" for path in paths])
        return [
            file_part(path, text_of(data), "before the change")
            for path, data in zip(paths, contents) if data is not None and reason_of_content(data) is None
        ]

    def _issue(self, discussion: Discussion) -> Iterator[Draft]:
        ids = self.encode([discussion.text])[0]
        if len(ids) > self._room:
            self.dropped["issue longer than a document"] += 1
        else:
            yield self._draft("issues", f"issue {discussion.number}", [ids])

    def _commits(self, told: set[str], most: int) -> Iterator[Draft]:
        chosen = []
        for commit in self.history:
            if len(chosen) == most:
                break
            if commit.id in told:
                self.dropped["commit told by its pull request"] += 1
            elif len(commit.parents) > 1:
                self.dropped["merge"] += 1
            elif commit.by_a_program:
                self.dropped["commit by a program"] += 1
            else:
                chosen.append(commit)
        found = changes(self.checkout, [commit.id for commit in chosen], self.left_out)
        for commit, (_, change) in zip(chosen, found, strict=True):
            if not change.files:
                self.dropped["commit without source in its change"] += 1
                continue
            text = f"# commit: {commit.message}\n\n{change.text}\n"
            ids = self.encode([text])[0] if len(text) <= 16 * self._room else None    # no tokenizer makes so long tokens on average
            if ids is None or len(ids) > self._room:
                self.dropped["commit longer than a document"] += 1
            else:
                yield self._draft("commits", f"commit {commit.id[:12]}", [ids])

    def _draft(self, bucket: str, label: str, parts: list[np.ndarray]) -> Draft:
        name = self.checkout.name
        return Draft(bucket, f"{name}, {label}", joined([self._head, *parts, self.end]), f"repository {name}")
