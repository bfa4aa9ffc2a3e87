"""Documents into rows: concatenated and cut, or packed whole.

truncate  the shuffled documents of a source, joined by <|endoftext|>, cut every sequence_length tokens (P 2.3, pre-training).
          The pieces are shuffled too: those of one long document would otherwise fill many steps in a row.
best_fit  documents longer than a row are cut into rows; the rest is packed by best fit within a window, so that nothing
          that fits is cut; attention and loss stay inside a document.

Both are pure functions of (seed parts, row number). An epoch reads every token once, in an order of its own. Any row is found
at once, whatever comes before it: what is packed together is the same in every epoch, so all epochs have the same rows in
another order.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from glm.data.blocks import Blocks, generator

SHUFFLED_TOKENS = 2**28
"""Rows of this many tokens are shuffled among each other; a source of any size needs no more memory."""
WINDOW_ROWS = 8192
"""Rows' worth of documents that are packed together, as long as they are no more than SHUFFLED_TOKENS: less fills worse."""


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


class TruncatedRows:
    """Rows of exactly ``sequence_length`` tokens, all under the loss; the label of the last token opens the next piece."""

    def __init__(self, blocks: Blocks, sequence_length: int, end_of_text: int, source: str, *seed: int | str):
        self.blocks, self.corpus, self.sequence_length, self.source = blocks, blocks.corpus, sequence_length, source
        self.end_of_text = end_of_text
        self.separator = 0 if self.corpus.separated else 1
        self.epoch_tokens = blocks.num_tokens + self.separator * blocks.num_documents
        self.shuffled_rows = max(1, min(SHUFFLED_TOKENS, self.epoch_tokens) // sequence_length)
        self._seed = seed
        self._epoch = lru_cache(maxsize=2)(self._order_blocks)
        self._documents = lru_cache(maxsize=2 * SHUFFLED_TOKENS // max(1, self.epoch_tokens // len(blocks.nonempty)) + 4)(self._order_documents)
        self._pieces = lru_cache(maxsize=2)(lambda part: generator(*seed, "pieces", part).permutation(self.shuffled_rows))

    def _order_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of an epoch and where each begins in its stream, with the end of the last appended."""
        order = generator(*self._seed, epoch).permutation(self.blocks.nonempty)
        tokens = self.blocks.counts[order] @ np.array([self.separator, 1])
        return order, np.concatenate([[0], np.cumsum(tokens)])

    def _order_documents(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The documents of a block in the order of an epoch: shard, first token in it, and where each begins in the stream of
        the block, with the end of the last appended."""
        order = generator(*self._seed, epoch, block).permutation(self.blocks.documents(block))
        shards, first, lengths = self.corpus.places(order)
        return shards, first, np.concatenate([[0], np.cumsum(lengths + self.separator)])

    def _read(self, position: int, count: int) -> np.ndarray:
        """Tokens of the endless stream of epochs."""
        tokens = np.full(count, self.end_of_text, dtype=np.int64) if self.separator else np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, within = divmod(position + done, self.epoch_tokens)
            blocks, block_starts = self._epoch(epoch)
            at = int(block_starts.searchsorted(within, side="right")) - 1
            shards, first, starts = self._documents(epoch, int(blocks[at]))
            within -= int(block_starts[at])
            wanted = min(count - done, int(starts[-1]) - within)
            some = slice(int(starts.searchsorted(within, side="right")) - 1, int(starts.searchsorted(within + wanted)))
            begin = starts[some] - within  # where each document begins in what is wanted, before it for the first
            skipped = np.maximum(-begin, 0)
            ends = np.minimum(starts[some.start + 1 : some.stop + 1] - within - self.separator, wanted)
            lengths = np.maximum(ends - begin - skipped, 0)
            self.corpus.read(shards[some], first[some] + skipped, lengths, tokens, done + begin + skipped)
            done += wanted
        return tokens

    def piece(self, number: int) -> int:
        """Which piece of the stream the row is."""
        part, within = divmod(number, self.shuffled_rows)
        return part * self.shuffled_rows + int(self._pieces(part)[within])

    def row(self, number: int) -> Row:
        length = self.sequence_length
        tokens = self._read(self.piece(number) * length, length + 1)
        return Row(tokens[:-1], tokens[1:], np.ones(length, np.float32), (length,), self.source)

    def tokens(self, rows: int) -> int:
        """Tokens in rows 0 … rows - 1."""
        return rows * self.sequence_length

    def epochs(self, rows: int) -> float:
        return rows * self.sequence_length / self.epoch_tokens

    def filled(self) -> float:
        """Share of the places of a row that hold a token."""
        return 1.0


@dataclass(frozen=True)
class Window:
    """Documents packed together. The pieces of row r are those from row_starts[r] to row_starts[r + 1]."""

    row_starts: np.ndarray
    shards: np.ndarray
    first: np.ndarray
    """First token of each piece in its shard."""
    lengths: np.ndarray


class PackedRows:
    """Rows of at most ``sequence_length`` tokens made of whole documents.

    ``counts``: int64[windows, 2], rows and tokens of each; as it was before, or None to pack the whole source once.
    """

    def __init__(self, blocks: Blocks, sequence_length: int, source: str, assistant_only: bool, *seed: int | str,
                 counts: np.ndarray | None = None):
        self.blocks, self.corpus, self.sequence_length, self.source = blocks, blocks.corpus, sequence_length, source
        self.assistant_only = assistant_only and self.corpus.masked
        self._seed = seed
        window_tokens = min(SHUFFLED_TOKENS, WINDOW_ROWS * sequence_length)
        self._blocks = generator(*seed, "windows").permutation(blocks.nonempty)
        tokens = np.cumsum(blocks.counts[self._blocks, 1])
        self._window_starts = np.searchsorted(tokens, np.arange(0, tokens[-1], window_tokens), side="right")
        self._window_starts = np.append(np.unique(self._window_starts), len(self._blocks))
        self.group = max(1, SHUFFLED_TOKENS // window_tokens)
        """Windows whose rows are shuffled among each other."""
        self._window = lru_cache(maxsize=2 * self.group + 2)(self._pack)
        self._epoch = lru_cache(maxsize=2)(self._order_windows)
        self._rows = lru_cache(maxsize=2)(self._order_rows)
        self._row_tokens = lru_cache(maxsize=2)(self._tokens_of_rows)
        self.counts = self._count() if counts is None else counts
        self.epoch_rows, self.epoch_tokens = self.counts.sum(0).tolist()

    def _count(self) -> np.ndarray:
        windows = range(len(self._window_starts) - 1)
        return np.array([(len(packed.row_starts) - 1, packed.lengths.sum()) for packed in map(self._window, windows)])

    def _pack(self, window: int) -> Window:
        from glm.data.best_fit import best_fit, cut_to_pieces  # compiles on first use

        blocks = self._blocks[self._window_starts[window] : self._window_starts[window + 1]]
        documents = np.concatenate([self.blocks.documents(block) for block in blocks.tolist()])
        documents = generator(*self._seed, "window", window).permutation(documents)
        shards, first, lengths = self.corpus.places(documents)
        document, start, length = cut_to_pieces(lengths, self.sequence_length)
        row, rows = best_fit(length, self.sequence_length)
        order = np.argsort(row, kind="stable")
        document = document[order]
        return Window(np.searchsorted(row[order], np.arange(rows + 1)), shards[document], first[document] + start[order], length[order])

    def _order_windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows of an epoch and the first row of each, with the end of the last appended."""
        order = generator(*self._seed, "epoch", epoch).permutation(len(self.counts))
        return order, np.concatenate([[0], np.cumsum(self.counts[order, 0])])

    def _order_rows(self, epoch: int, group: int) -> np.ndarray:
        """The rows of a group of windows, counted from its first, in the order they come."""
        starts = self._epoch(epoch)[1]
        first, end = starts[group * self.group], starts[min((group + 1) * self.group, len(starts) - 1)]
        return generator(*self._seed, "rows", epoch, group).permutation(end - first)

    def _find(self, number: int) -> tuple[Window, int]:
        """(window, row within it): rows with large documents come first in a window, so rows are shuffled."""
        epoch, within = divmod(number, self.epoch_rows)
        windows, starts = self._epoch(epoch)
        group = (int(starts.searchsorted(within, side="right")) - 1) // self.group
        first = int(starts[group * self.group])
        row = first + int(self._rows(epoch, group)[within - first])
        at = int(starts.searchsorted(row, side="right")) - 1
        return self._window(int(windows[at])), row - int(starts[at])

    def row(self, number: int) -> Row:
        window, row = self._find(number)
        pieces = slice(*window.row_starts[row : row + 2].tolist())
        shards, first, lengths = window.shards[pieces], window.first[pieces], window.lengths[pieces]
        ends = lengths.cumsum()
        tokens = np.empty(ends[-1], dtype=np.int64)
        self.corpus.read(shards, first, lengths, tokens, ends - lengths)
        labels = np.empty_like(tokens)
        labels[:-1] = tokens[1:]
        labels[ends - 1] = 0
        mask = np.ones(len(tokens), np.float32)
        if self.assistant_only:  # the mask says which token is learned, the loss stands at the one before it
            learned = np.empty(len(tokens), np.float32)
            self.corpus.read(shards, first, lengths, learned, ends - lengths, masks=True)
            mask[:-1] = learned[1:]
        mask[ends - 1] = 0.0
        return Row(tokens, labels, mask, tuple(lengths.tolist()), self.source)

    def tokens(self, rows: int) -> int:
        """Tokens in rows 0 … rows - 1."""
        epoch, within = divmod(rows, self.epoch_rows)
        windows, starts = self._epoch(epoch)
        group = (int(starts.searchsorted(within, side="right")) - 1) // self.group
        first = group * self.group
        whole = int(self.counts[windows[:first], 1].sum())
        return epoch * self.epoch_tokens + whole + int(self._row_tokens(epoch, group)[within - int(starts[first])])

    def _tokens_of_rows(self, epoch: int, group: int) -> np.ndarray:
        """Tokens in the first n rows of a group in the order they come, for every n."""
        windows = self._epoch(epoch)[0][group * self.group : (group + 1) * self.group]
        packed = [self._window(window) for window in windows.tolist()]
        of_rows = np.concatenate([np.add.reduceat(window.lengths, window.row_starts[:-1]) for window in packed])
        return np.concatenate([[0], np.cumsum(of_rows[self._rows(epoch, group)])])

    def epochs(self, rows: int) -> float:
        return rows / self.epoch_rows

    def filled(self) -> float:
        """Share of the places of an epoch's rows that hold a token."""
        return self.epoch_tokens / (self.epoch_rows * self.sequence_length)
