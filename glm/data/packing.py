"""Documents into rows: concatenated and cut, or packed whole.

truncate  the shuffled documents of a source, joined by <|endoftext|>, cut every sequence_length tokens (P 2.3, pre-training).
          The pieces are shuffled too: those of one long document would otherwise fill many steps in a row.
best_fit  documents longer than a row are cut into rows; the rest is packed by best fit within a window, so that nothing
          that fits is cut; attention and loss stay inside a document.

Both are pure functions of (seed parts, row number). An epoch reads every token once, in an order of its own.
"""

import zlib
from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from glm.data.tokenized import TokenizedCorpus

SHUFFLED_ROWS = 2**20
"""Neighbouring rows of a truncated source that are shuffled among each other; a source of any size needs no more memory."""
WINDOW_ROWS = 512
"""Rows' worth of documents that are packed together."""


@dataclass(frozen=True)
class Row:
    """One training sequence of n tokens.

    token_ids, labels (the next token): int64[n]; loss_mask: float32[n]; document_lengths sum to n, attention stays inside each.
    """

    token_ids: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    document_lengths: tuple[int, ...]
    source: str


def generator(*parts: int | str) -> np.random.Generator:
    """A generator that depends on all parts and nothing else."""
    return np.random.default_rng([zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts])


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Indices into ``lengths`` (each at most ``capacity``) by row; each document goes into the fullest row it fits.

    Longer than a quarter of a row: the longest first, as filling well needs. The small ones follow in the order given: sorted
    too, they would fill rows with documents of one length, which is often of one kind.
    """
    large = np.flatnonzero(lengths > capacity // 4)
    small = np.flatnonzero(lengths <= capacity // 4)
    order = np.concatenate([large[np.argsort(-lengths[large], kind="stable")], small])
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (space left, row), sorted
    for index in order.tolist():
        length = int(lengths[index])
        at = bisect_left(open_rows, (length, -1))
        if at < len(open_rows):
            space, row = open_rows.pop(at)
            rows[row].append(index)
        else:
            space, row = capacity, len(rows)
            rows.append([index])
        if space > length:
            insort(open_rows, (space - length, row))
    return rows


def cut_to_pieces(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, length) of the pieces of documents no longer than ``capacity``; shorter documents are one piece."""
    pieces = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), pieces)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * capacity
    return document, start, np.minimum(capacity, lengths[document] - start)


class TruncatedRows:
    """Rows of exactly ``sequence_length`` tokens, all under the loss; the label of the last token opens the next piece."""

    def __init__(self, corpus: TokenizedCorpus, documents: np.ndarray, sequence_length: int, end_of_text: int, source: str,
                 *seed: int | str):
        self.corpus, self.documents, self.sequence_length, self.source = corpus, documents, sequence_length, source
        self.end_of_text = np.array([] if corpus.separated else [end_of_text], dtype=np.int64)
        self.epoch_tokens = int(corpus.lengths(documents).sum()) + len(self.end_of_text) * len(documents)
        self.block_rows = min(SHUFFLED_ROWS, max(1, self.epoch_tokens // sequence_length))
        self._epoch = lru_cache(maxsize=2)(lambda epoch: self._order(*seed, epoch))
        self._block = lru_cache(maxsize=2)(lambda block: generator(*seed, "pieces", block).permutation(self.block_rows))

    def _order(self, *seed: int | str) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch and where each begins, with the end of the last appended."""
        order = generator(*seed).permutation(self.documents)
        lengths = self.corpus.lengths(order) + len(self.end_of_text)
        return order, np.concatenate([[0], np.cumsum(lengths)])

    def _read(self, position: int, count: int) -> np.ndarray:
        """Tokens of the endless stream of epochs."""
        parts: list[np.ndarray] = []
        while count > 0:
            epoch, within = divmod(position, self.epoch_tokens)
            order, starts = self._epoch(epoch)
            at = int(np.searchsorted(starts, within, side="right")) - 1
            shard, first, length = self.corpus.place(int(order[at]))
            begin = first + int(within - starts[at])
            part = shard.tokens[begin : min(begin + count, first + length)].astype(np.int64)
            if len(part) < count:
                part = np.concatenate([part, self.end_of_text])
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return np.concatenate(parts)

    def piece(self, number: int) -> int:
        """Which piece of the stream the row is."""
        block, within = divmod(number, self.block_rows)
        return block * self.block_rows + int(self._block(block)[within])

    def row(self, number: int) -> Row:
        length = self.sequence_length
        tokens = self._read(self.piece(number) * length, length + 1)
        return Row(tokens[:-1], tokens[1:], np.ones(length, np.float32), (length,), self.source)

    def epochs(self, rows: int) -> float:
        return rows * self.sequence_length / self.epoch_tokens


class PackedRows:
    """Rows of at most ``sequence_length`` tokens made of whole documents."""

    def __init__(self, corpus: TokenizedCorpus, documents: np.ndarray, sequence_length: int, source: str, assistant_only: bool,
                 *seed: int | str):
        self.corpus, self.documents, self.sequence_length, self.source = corpus, documents, sequence_length, source
        self.assistant_only = assistant_only and corpus.masked
        self._starts = [0]  # first row of each epoch so far, and of the next
        self._epoch = lru_cache(maxsize=2)(lambda epoch: self._pack(*seed, epoch))

    def _pack(self, *seed: int | str) -> list[list[tuple[int, int, int]]]:
        """An epoch's rows as (document, start, length) lists. Rows with large documents come out first, so rows are shuffled."""
        rng = generator(*seed)
        order = rng.permutation(self.documents)
        document, start, length = cut_to_pieces(self.corpus.lengths(order), self.sequence_length)
        windows = np.cumsum(length) // (WINDOW_ROWS * self.sequence_length)
        pieces = list(zip(order[document].tolist(), start.tolist(), length.tolist()))
        rows: list[list[tuple[int, int, int]]] = []
        first = 0
        for count in np.bincount(windows.astype(np.int64)).tolist():
            packed = best_fit(length[first : first + count], self.sequence_length)
            rows += [[pieces[first + index] for index in packed[row]] for row in rng.permutation(len(packed)).tolist()]
            first += count
        return rows

    def _find(self, number: int) -> tuple[int, int]:
        """(epoch, row within it)."""
        while self._starts[-1] <= number:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
        return epoch, number - self._starts[epoch]

    def row(self, number: int) -> Row:
        epoch, within = self._find(number)
        tokens, labels, masks, lengths = [], [], [], []
        for document, start, length in self._epoch(epoch)[within]:
            shard, first, _ = self.corpus.place(document)
            begin = first + start
            ids = shard.tokens[begin : begin + length].astype(np.int64)
            mask = np.ones(length, np.float32)
            if self.assistant_only:  # the mask says which token is learned, the loss stands at the one before it
                mask[:-1] = shard.mask[begin + 1 : begin + length]
            mask[-1] = 0.0
            tokens.append(ids)
            labels.append(np.append(ids[1:], 0))
            masks.append(mask)
            lengths.append(length)
        return Row(np.concatenate(tokens), np.concatenate(labels), np.concatenate(masks), tuple(lengths), self.source)

    def epochs(self, rows: int) -> float:
        if rows == 0:
            return 0.0
        epoch, within = self._find(rows - 1)
        return epoch + (within + 1) / len(self._epoch(epoch))

    def filled(self) -> float:
        """Share of the places of the first epoch's rows that hold a token."""
        rows = self._epoch(0)
        return int(self.corpus.lengths(self.documents).sum()) / (len(rows) * self.sequence_length)
