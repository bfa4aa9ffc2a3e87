"""The commits of a repository and what they change, as text in the form of a diff."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from midtrain.checkout import Checkout, git
from midtrain.selection import reason_of_path

COMMITS_AT_ONCE = 128
DIFF = ("diff-tree", "-r", "-p", "-M", "--no-color", "--no-ext-diff", "--no-textconv")
"""Git's plumbing, without anything a user's settings could change."""
PULL_REQUEST = re.compile(r"\(#(\d+)\)\s*$|^Merge pull request #(\d+) ")
BOT = re.compile(r"\[bot\]$|^(dependabot|renovate|github-actions|greenkeeper|pre-commit-ci)\b", re.IGNORECASE)
TRAILER = re.compile(
    r"^(signed-off-by|co-authored-by|reviewed-by|acked-by|tested-by|reported-by|cc|change-id|git-svn-id):.*\n?", re.IGNORECASE | re.MULTILINE
)
NOT_SHOWN = re.compile(r"^(index [0-9a-f]+\.\.|similarity index |dissimilarity index )[^\n]*\n", re.MULTILINE)
BEFORE = re.compile(r"^(?:--- a/|rename from )([^\n\t]+)", re.MULTILINE)
AFTER = re.compile(r"^(?:\+\+\+ b/|rename to )([^\n\t]+)", re.MULTILINE)


@dataclass(frozen=True)
class Commit:
    """Without its author: a name teaches nothing here."""

    id: str
    parents: tuple[str, ...]
    author: str
    message: str

    @property
    def pull_request(self) -> int | None:
        """The number GitHub writes at the end of a squashed commit's first line, or at the beginning of a merge's."""
        match = PULL_REQUEST.search(self.message.partition("\n")[0])
        return int(match[1] or match[2]) if match else None

    @property
    def by_a_program(self) -> bool:
        return bool(BOT.search(self.author))


@dataclass(frozen=True)
class Change:
    """What lies between two commits: for each file worth reading its path and its part of the diff."""

    files: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        return "".join(diff for _, diff in self.files)


def commits(checkout: Checkout) -> list[Commit]:
    """All of HEAD's history, newest first."""
    listed = git(checkout.git_dir, "log", "-z", "--no-show-signature", "--format=%H%x01%P%x01%an%x01%B", checkout.commit)
    found = []
    for entry in listed.decode(errors="replace").split("\0"):
        if entry:
            identity, parents, author, message = entry.split("\x01", 3)
            found.append(Commit(identity.strip(), tuple(parents.split()), author, TRAILER.sub("", message).strip()))
    return found


def changes(checkout: Checkout, ids: Iterable[str], left_out: Counter) -> Iterator[tuple[str, Change]]:
    """(id, what it changes) of commits with at most one parent, in the order given."""
    ids = list(ids)
    for first in range(0, len(ids), COMMITS_AT_ONCE):
        some = ids[first : first + COMMITS_AT_ONCE]
        listed = "".join(f"{identity}\n" for identity in some).encode()
        shown = git(checkout.git_dir, *DIFF, "--stdin", "--root", "--format=%x00%H%x00", given=listed)
        parts = re.split(rb"^\x00([0-9a-f]{40,64})\x00\n", shown, flags=re.MULTILINE)
        diffs = dict(zip((identity.decode() for identity in parts[1::2]), parts[2::2]))
        for identity in some:
            yield identity, _change(diffs.get(identity, b""), left_out)


def change_between(checkout: Checkout, base: str, tip: str, left_out: Counter) -> Change:
    return _change(git(checkout.git_dir, *DIFF, base, tip), left_out)


def _change(diff: bytes, left_out: Counter) -> Change:
    files = []
    for part in re.split(rb"^(?=diff --git )", diff, flags=re.MULTILINE):
        if not part.startswith(b"diff --git "):
            continue
        reason = None
        try:
            text = NOT_SHOWN.sub("", part.decode().replace("\r\n", "\n"), count=2)
        except UnicodeDecodeError:
            reason = "not UTF-8"
        if reason is None:
            path = _path(text)
            reason = reason_of_path(path) if path else "mode only"
            if "\nBinary files " in text or "\nGIT binary patch" in text:
                reason = "binary"
        if reason:
            left_out[reason] += 1
        else:
            files.append((path, text))
    return Change(tuple(files))


def _path(diff: str) -> str | None:
    """Where the file stands after the change; where it stood, if it was removed; None where only its mode changed."""
    after = AFTER.search(diff.partition("\n@@")[0])
    return after[1] if after else path_before(diff)


def path_before(diff: str) -> str | None:
    """Where the file stood before the change; None if it was new."""
    before = BEFORE.search(diff.partition("\n@@")[0])
    return before[1] if before else None
