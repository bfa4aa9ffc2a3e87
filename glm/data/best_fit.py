"""Best-fit packing: documents into rows of a fixed length, none cut that fits."""

import numpy as np
from numba import njit

SORTED_ABOVE = 12
"""Documents longer than a row divided by this are placed longest first."""


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """int32[documents] row of each document, and the number of rows. ``lengths`` are each at most ``capacity``.

    Each document goes into the fullest row it fits in. Longer than a twelfth of a row: the longest first, as filling well needs.
    The small ones follow in the order given: sorted too, they would fill rows with documents of one length, which is often of
    one kind.
    """
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    is_large = lengths > capacity // SORTED_ABOVE
    large = np.flatnonzero(is_large)
    order = np.concatenate([large[np.argsort(-lengths[large], kind="stable")], np.flatnonzero(~is_large)])
    return _place(lengths, order, capacity)


@njit(cache=True)
def _place(lengths, order, capacity):
    """Open rows lie in stacks by the space they have left; a binary tree over the spaces says which stacks hold any."""
    leaves = 1
    while leaves <= capacity:
        leaves *= 2
    holds_any = np.zeros(2 * leaves, np.uint8)
    top = np.full(capacity + 1, -1, np.int32)
    below = np.empty(len(order), np.int32)
    row_of = np.empty(len(order), np.int32)
    rows = 0
    for index in order:
        length = lengths[index]
        space = _least_space(holds_any, leaves, length)
        if space < 0:
            row, space = rows, capacity
            rows += 1
        else:
            row = top[space]
            top[space] = below[row]
            if top[space] < 0:
                node = leaves + space
                holds_any[node] = 0
                node //= 2
                while node and not (holds_any[2 * node] or holds_any[2 * node + 1]):
                    holds_any[node] = 0
                    node //= 2
        row_of[index] = row
        space -= length
        if space:
            below[row] = top[space]
            top[space] = row
            node = leaves + space
            while node and not holds_any[node]:
                holds_any[node] = 1
                node //= 2
    return row_of, rows


@njit(cache=True)
def _least_space(holds_any, leaves, length):
    """The least space of at least ``length`` that an open row has; -1 if none has."""
    node = leaves + length
    if holds_any[node]:
        return length
    while node > 1:
        if node % 2 == 0 and holds_any[node + 1]:
            node += 1
            while node < leaves:
                node *= 2
                if not holds_any[node]:
                    node += 1
            return node - leaves
        node //= 2
    return -1


def cut_to_pieces(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, length) of the pieces of documents no longer than ``capacity``; shorter documents are one piece."""
    pieces = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), pieces)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * capacity
    return document, start, np.minimum(capacity, lengths[document] - start)
