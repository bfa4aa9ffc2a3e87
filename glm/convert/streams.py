"""Bytes from where they lie to where they go, a block at a time: spans of files, columns side by side, types changed, sums done."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Protocol, Sequence

import numpy
import torch
from torch import Tensor

from glm.errors import CheckpointError

BLOCK = 1 << 20
"""Bytes a worker holds at a time: as much as stays in a core's own cache between being read, digested and written."""


class Stream(Protocol):
    """Bytes in order. A block is valid until the next is asked for."""

    @property
    def nbytes(self) -> int: ...

    def blocks(self, buffer: memoryview) -> Iterator[memoryview]: ...


@dataclass(frozen=True)
class Bytes:
    """Bytes that are known."""

    value: bytes

    @property
    def nbytes(self) -> int:
        return len(self.value)

    def blocks(self, buffer: memoryview) -> Iterator[memoryview]:
        yield memoryview(self.value)


@dataclass(frozen=True)
class Span:
    """Consecutive bytes of a file."""

    path: Path
    offset: int
    nbytes: int

    def blocks(self, buffer: memoryview) -> Iterator[memoryview]:
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            left = self.nbytes
            while left:
                block = buffer[: min(len(buffer), left)]
                _fill(file, block, self)
                left -= len(block)
                yield block


@dataclass(frozen=True)
class Columns:
    """Rows of which every file has some columns: ``parts`` are spans of as many rows, from left to right."""

    parts: tuple[Span, ...]
    rows: int

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def blocks(self, buffer: memoryview) -> Iterator[memoryview]:
        width = self.nbytes // self.rows
        band = max(1, min(len(buffer) // width, self.rows))
        block = numpy.frombuffer(buffer if band * width <= len(buffer) else bytearray(width), dtype=numpy.uint8)[: band * width]
        for first in range(0, self.rows, band):
            count = min(band, self.rows - first)
            rows = block[: count * width].reshape(count, width)
            left = 0
            for part in self.parts:
                own = part.nbytes // self.rows
                read = numpy.empty((count, own), dtype=numpy.uint8)
                with part.path.open("rb", buffering=0) as file:
                    file.seek(part.offset + first * own)
                    _fill(file, memoryview(read).cast("B"), part)
                rows[:, left : left + own] = read
                left += own
            yield memoryview(block[: count * width])


@dataclass(frozen=True)
class Cast:
    """The same numbers in another type. ``exact``: raises CheckpointError rather than round."""

    stream: Stream
    found: torch.dtype
    wanted: torch.dtype
    exact: bool
    where: str

    @property
    def nbytes(self) -> int:
        return self.stream.nbytes // self.found.itemsize * self.wanted.itemsize

    def blocks(self, buffer: memoryview) -> Iterator[memoryview]:
        for block in self.stream.blocks(buffer):
            tensor = torch.frombuffer(block, dtype=self.found)
            if self.exact and not is_exact(tensor, self.wanted):
                raise CheckpointError(
                    self.where, f"values that {self.wanted} cannot hold", f"the {self.wanted} values the manifest tells of",
                    "convert again from the first folder",
                )
            yield memoryview(_narrowed(tensor, self.wanted).view(torch.uint8).numpy())


@dataclass
class Computed:
    """What ``make`` gives, made when it is asked for and forgotten afterwards."""

    make: Callable[[], Tensor]
    nbytes: int

    def blocks(self, buffer: memoryview) -> Iterator[memoryview]:
        tensor = self.make().contiguous()
        assert tensor.nbytes == self.nbytes, (tensor.shape, tensor.dtype, self.nbytes)
        yield memoryview(tensor.flatten().view(torch.uint8).numpy())


def is_exact(tensor: Tensor, wanted: torch.dtype) -> bool:
    """Whether every value of ``tensor`` (float32 or bfloat16), also one that is no number, can be held by ``wanted``."""
    if tensor.dtype is torch.float32 and wanted is torch.bfloat16:
        return not (tensor.view(torch.int32) & 0xFFFF).any()
    return wanted.itemsize >= tensor.dtype.itemsize


def read(streams: Sequence[Stream], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A whole tensor in memory."""
    data, position = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8), 0
    buffer = memoryview(bytearray(BLOCK))
    for stream in streams:
        for block in stream.blocks(buffer):
            data[position : position + len(block)] = torch.frombuffer(block, dtype=torch.uint8)
            position += len(block)
    assert position == data.nbytes, (position, dtype, shape)
    return data.view(dtype).reshape(shape)


def _narrowed(tensor: Tensor, wanted: torch.dtype) -> Tensor:
    if tensor.dtype is torch.float32 and wanted is torch.bfloat16 and is_exact(tensor, wanted):
        return tensor.view(torch.int16)[1::2].contiguous().view(wanted)  # .to() would change what is not a number
    return tensor.to(wanted)


def _fill(file, block: memoryview, span: Span) -> None:
    done = 0
    while done < len(block):
        count = file.readinto(block[done:])
        if not count:
            raise CheckpointError(
                str(span.path), f"the file ends at byte {file.tell():,}",
                f"bytes {span.offset:,} to {span.offset + span.nbytes:,}", "it was cut while it was read; bring it back whole",
            )
        done += count
