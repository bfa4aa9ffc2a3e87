"""The rows of a stored tensor as byte streams, whatever chunks it was saved in: by any layout of ranks, in any order."""

from pathlib import Path
from typing import Iterator

from glm.checkpoint import torch_dist
from glm.checkpoint.torch_dist import Item, Stored
from glm.convert.streams import Columns, Span, Stream
from glm.errors import CheckpointError


class StoredRows:
    """Reads from one checkpoint; looks up each chunk's place in its file once."""

    def __init__(self, checkpoint: Path, tensors: dict[str, Stored]):
        self._checkpoint, self._tensors = checkpoint, tensors
        self._begin: dict[Item, int] = {}

    def streams(self, key: str, expert: int | None, first: int, count: int) -> Iterator[tuple[Stream, tuple[Item, ...]]]:
        """Rows ``first`` to ``first + count`` of the tensor, or of one expert's matrix, as streams in order with the chunks they read.

        Raises CheckpointError when the chunks do not cover them exactly once.
        """
        touching = [chunk for chunk in self._tensors[key].chunks if _has_expert(chunk, expert)]
        touching = [chunk for chunk in touching if _rows(chunk, expert)[0] < first + count and _rows(chunk, expert)[1] > first]
        edges = sorted({first, first + count} | {
            edge for chunk in touching for edge in _rows(chunk, expert) if first < edge < first + count
        })
        for begin, end in zip(edges, edges[1:]):
            band = [chunk for chunk in touching if _rows(chunk, expert)[0] <= begin and _rows(chunk, expert)[1] >= end]
            band.sort(key=lambda chunk: _columns(chunk, expert))
            self._require_cover(key, expert, begin, end, band)
            parts = tuple(self._span(chunk, expert, begin, end) for chunk in band)
            yield parts[0] if len(parts) == 1 else Columns(parts, end - begin), tuple(band)

    def _span(self, chunk: Item, expert: int | None, begin: int, end: int) -> Span:
        if chunk not in self._begin:
            self._begin[chunk] = torch_dist.data_offset(self._checkpoint, chunk)
        left, right = _columns(chunk, expert)
        width = (right - left) * chunk.dtype.itemsize
        low, high = _rows(chunk, expert)
        before = 0 if expert is None else (expert - chunk.start[0]) * (high - low)
        return Span(self._checkpoint / chunk.file, self._begin[chunk] + (before + begin - low) * width, (end - begin) * width)

    def _require_cover(self, key: str, expert: int | None, begin: int, end: int, band: list[Item]) -> None:
        matrix = self._tensors[key].shape[0 if expert is None else 1 :]
        columns = [_columns(chunk, expert) for chunk in band]
        lefts, rights = [0, *(right for _, right in columns)], [*(left for left, _ in columns), matrix[1] if len(matrix) > 1 else 1]
        if lefts != rights:
            raise CheckpointError(
                f"{self._checkpoint / torch_dist.METADATA}: {key}",
                f"rows {begin} to {end}{'' if expert is None else f' of expert {expert}'} in chunks with columns {columns}",
                "chunks that cover the tensor once", "use a checkpoint of this suite that was written whole",
            )


def _has_expert(chunk: Item, expert: int | None) -> bool:
    return expert is None or chunk.start[0] <= expert < chunk.start[0] + chunk.sizes[0]


def _rows(chunk: Item, expert: int | None) -> tuple[int, int]:
    axis = 0 if expert is None else 1
    return chunk.start[axis], chunk.start[axis] + chunk.sizes[axis]


def _columns(chunk: Item, expert: int | None) -> tuple[int, int]:
    """(0, 1) for a vector, whose elements are rows."""
    axis = 1 if expert is None else 2
    return (chunk.start[axis], chunk.start[axis] + chunk.sizes[axis]) if len(chunk.sizes) > axis else (0, 1)
