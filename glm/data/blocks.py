"""The documents of a corpus in blocks of about a million tokens, the unit of shuffling.

Whole corpora are never permuted: blocks are, and documents within a block. Memory and the cost of a start then grow with the
number of blocks, a few bytes for every million tokens.
"""

import zlib

import numpy as np

from glm.data.tokenized import TokenizedCorpus

BLOCK_TOKENS = 2**20


def generator(*parts: int | str) -> np.random.Generator:
    """A generator that depends on all parts and nothing else."""
    return np.random.default_rng([zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts])


class Blocks:
    """The training or the held-out documents of a corpus. ``counts``: as ``count`` returned it before."""

    def __init__(self, corpus: TokenizedCorpus, *, held_out: bool, counts: np.ndarray | None = None, block_tokens: int = BLOCK_TOKENS):
        self.corpus, self.wants_held_out = corpus, held_out
        self._starts = _starts(corpus, block_tokens)
        self.counts = self._count() if counts is None else counts
        """int64[blocks, 2]: documents and tokens."""
        self.nonempty = np.flatnonzero(self.counts[:, 0])
        """Numbers of the blocks that hold a document."""

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def num_documents(self) -> int:
        return int(self.counts[:, 0].sum())

    @property
    def num_tokens(self) -> int:
        return int(self.counts[:, 1].sum())

    def _count(self) -> np.ndarray:
        """Reads the index of the corpus once."""
        counts = np.zeros((len(self._starts) - 1, 2), dtype=np.int64)
        for block in range(len(counts)):
            documents = self.documents(block)
            counts[block] = len(documents), self.corpus.lengths(documents).sum()
        return counts

    def documents(self, block: int) -> np.ndarray:
        """Numbers of a block's documents, in the order of the corpus."""
        documents = np.arange(self._starts[block], self._starts[block + 1])
        return documents[self.corpus.held_out(documents) == self.wants_held_out]


def _starts(corpus: TokenizedCorpus, block_tokens: int) -> np.ndarray:
    """int64[blocks + 1]: the first document of each block, and how many documents there are. A block begins with the first
    document that begins at or after a multiple of ``block_tokens``."""
    places = np.arange(0, corpus.num_tokens, block_tokens)
    shards = np.searchsorted(corpus.first_tokens, places, side="right") - 1
    starts = [np.zeros(1, dtype=np.int64), np.array([corpus.num_documents])]
    for number in np.unique(shards).tolist():
        within = places[shards == number] - corpus.first_tokens[number]
        starts.append(np.searchsorted(corpus.shards[number].offsets, within) + corpus.first_documents[number])
    return np.unique(np.concatenate(starts))
