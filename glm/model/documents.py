"""Which tokens of a micro-batch attend to which, and what this rank holds of it under context parallelism.

A micro-batch is B rows of S tokens, or one row of T tokens packed from documents. Under context parallelism every row is cut
into 2 x cp equal pieces and rank r holds pieces r and 2 cp - 1 - r, so that causal attention costs all ranks the same.
Queries stay where they are; keys and values of the whole row come together (glm.model.attention).
"""

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass(frozen=True)
class DocumentGroup:
    """Documents of similar length that begin on this rank and share one attention call.

    ``queries``: int64 [documents, longest], places in this rank's row; ``keys``: the same places in the whole row (padding
    repeats the last token, whose causal mask never reaches a real query). ``real``: bool of the same shape.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    real: torch.Tensor
    filled: torch.Tensor
    """int64 [real tokens]: the places of ``real``, counted through, document by document."""
    tokens: torch.Tensor
    """int64 [real tokens]: where the results go in this rank's row."""


@dataclass(frozen=True)
class Segment:
    """A run of queries and the run of keys that ends with the last of them: the document from its beginning."""

    queries: slice
    keys: slice


@dataclass
class Documents(PackedSeqParams):
    """What megatron passes through its layers as ``packed_seq_params``; only our attention and MTP layer read it."""

    lengths: list[int] = field(default_factory=list)
    """Documents of the whole row, in order; one of S for plain rows."""
    packed: bool = False
    """One row of documents, rather than rows that are one document each."""
    segments: list[Segment] = field(default_factory=list)
    groups: list[DocumentGroup] = field(default_factory=list)
    results: torch.Tensor | None = None
    """int64 [this rank's tokens]: where each one stands when the results of segments and groups are put one after the other."""
    order: torch.Tensor | None = None
    """int64 [whole row]: where each place of the row stands when the ranks' parts are put one after the other; None without cp."""
    mtp_token_ids: torch.Tensor | None = None
    """int64 [B, this rank's tokens]: the token after each one inside its document, 0 at its end: what the MTP layer embeds."""
    mtp_labels: torch.Tensor | None = None
    """int64, the same shape: the label of the token after each one."""
    mtp_mask: torch.Tensor | None = None
    """float32, the same shape: the loss mask of the token after each one, 0 at the end of a document."""
    spans: tuple[torch.Tensor, torch.Tensor] | None = None
    """int64 [this rank's tokens] each: place in the whole row, and where the document begins; made when first asked for."""


def context_places(length: int, cp_rank: int, cp_size: int) -> torch.Tensor:
    """int64 [length / cp_size]: the places of a row that a context-parallel rank holds, in the order in which it holds them."""
    if cp_size == 1:
        return torch.arange(length)
    assert length % (2 * cp_size) == 0, f"{length} tokens over {cp_size} context-parallel ranks"
    pieces = torch.arange(length).chunk(2 * cp_size)
    return torch.cat([pieces[cp_rank], pieces[2 * cp_size - 1 - cp_rank]])


def gathered_order(length: int, cp_size: int) -> torch.Tensor:
    """int64 [length]: where each place of the row stands when the ranks' parts are put one after the other."""
    held = torch.cat([context_places(length, rank, cp_size) for rank in range(cp_size)])
    return held.argsort()


def next_in_document(rows: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """[B, S] -> [B, S]: the value that follows inside the same document, 0 at the end of each."""
    shifted = torch.cat([rows[:, 1:], torch.zeros_like(rows[:, :1])], dim=1)
    ends = torch.tensor(lengths).cumsum(0) - 1
    shifted[:, ends[ends >= 0]] = 0
    return shifted


def lay_out(lengths: list[int], packed: bool, cp_rank: int = 0, cp_size: int = 1) -> tuple[list[Segment], list[DocumentGroup]]:
    """The attention calls of one rank.

    Whole rows and the documents that began on an earlier piece are segments; packed documents that begin on this rank are
    grouped, so that a pack of many short ones costs a few calls. A rank has at most two documents begun elsewhere.
    """
    length = sum(lengths)
    starts = [0]
    for size in lengths:
        starts.append(starts[-1] + size)
    segments, fresh = [], []
    piece = length // (2 * cp_size) if cp_size > 1 else length
    bounds = [(0, length)] if cp_size == 1 else [(at * piece, (at + 1) * piece) for at in (cp_rank, 2 * cp_size - 1 - cp_rank)]
    held = 0
    for first, last in bounds:
        for start, end in zip(starts, starts[1:]):
            low, high = max(start, first), min(end, last)
            if low < high:
                if packed and low == start:
                    fresh.append((held + low - first, low, high - low))
                else:
                    segments.append(Segment(slice(held + low - first, held + high - first), slice(start, high)))
        held += last - first
    return segments, _grouped(fresh)


def result_places(segments: list[Segment], groups: list[DocumentGroup]) -> torch.Tensor:
    """``Documents.results`` of these attention calls."""
    places = [torch.arange(segment.queries.start, segment.queries.stop) for segment in segments]
    return torch.cat([*places, *(group.tokens for group in groups)]).argsort()


def _grouped(fresh: list[tuple[int, int, int]]) -> list[DocumentGroup]:
    """(place on this rank, place in the row, length) of documents as groups, no more than about half padding: one a power of two."""
    buckets: dict[int, list[tuple[int, int, int]]] = {}
    for document in fresh:
        buckets.setdefault(document[2].bit_length(), []).append(document)
    groups = []
    for members in buckets.values():
        here, there, sizes = (torch.tensor(column)[:, None] for column in zip(*members))
        column = torch.arange(int(sizes.max()))[None, :]
        inside = torch.minimum(column, sizes - 1)
        real = column < sizes
        groups.append(DocumentGroup(here + inside, there + inside, real, real.flatten().nonzero().flatten(), (here + inside)[real]))
    return groups
