"""The files of a repository as documents no longer than a stage's sequence, cut between files."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from glm.data.repository import file_part, heading, pieces_of_text, reading_order
from midtrain.document import Draft, Encode, joined

CHARACTERS_AT_ONCE = 2_000_000
LARGEST_PART = 10**6
"""A heading with this number is taken for the longest there is."""


def file_documents(name: str, files: dict[str, str], encode: Encode, end: np.ndarray, capacity: int, counted: Counter) -> Iterator[Draft]:
    """Documents of at most ``capacity`` tokens, ``end`` included. A file that fits into one is whole in one; a longer one is cut at
    line ends into documents of its own, with its path at the head of each."""
    room = capacity - len(end) - len(encode([heading(name, LARGEST_PART)])[0])
    for number, parts in enumerate(_groups(files, encode, room, counted), start=1):
        head = encode([heading(name, number)])[0]
        yield Draft("files", f"{name}, part {number}", joined([head, *parts, end]), f"repository {name}")


def _groups(files: dict[str, str], encode: Encode, room: int, counted: Counter) -> Iterator[list[np.ndarray]]:
    """Neighbouring files, as many as fit into ``room`` tokens."""
    group: list[np.ndarray] = []
    left = room
    for path, ids in _encoded(files, encode):
        pieces: list[np.ndarray] = []
        if len(ids) > room:
            pieces = cut_file(path, files[path], len(ids), encode, room) if room > 0 else []
            counted["file longer than a document, cut" if pieces else "file whose path alone is longer than a document"] += 1
        if len(ids) > left and group:
            yield group
            group, left = [], room
        yield from ([piece] for piece in pieces)
        if len(ids) <= room:
            group.append(ids)
            left -= len(ids)
    if group:
        yield group


def _encoded(files: dict[str, str], encode: Encode) -> Iterator[tuple[str, np.ndarray]]:
    """Each path in reading order with the ids of its part, not all of a large repository at a time."""
    waiting: list[str] = []
    size = 0
    for path in reading_order(files):
        waiting.append(path)
        size += len(files[path])
        if size > CHARACTERS_AT_ONCE:
            yield from zip(waiting, encode([file_part(path, files[path]) for path in waiting]))
            waiting, size = [], 0
    yield from zip(waiting, encode([file_part(path, files[path]) for path in waiting]))


def cut_file(path: str, text: str, tokens: int, encode: Encode, room: int) -> list[np.ndarray]:
    """A file of ``tokens`` > ``room`` in pieces of like size that fit, hardly more than needed."""
    count = -(-tokens // room)
    while count <= len(text):
        pieces = pieces_of_text(text, count)
        encoded = encode([file_part(path, piece, f"piece {number} of {len(pieces)}") for number, piece in enumerate(pieces, start=1)])
        if max(map(len, encoded)) <= room:
            return encoded
        count += max(1, count // 8)
    return []    # not even one character fits beside the path
