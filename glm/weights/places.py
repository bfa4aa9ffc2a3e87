"""Where the bytes of a tensor lie in a file: the header of a safetensors file, read and proved, without its data.

The file starts with the length of its header (8 bytes, little endian), then the header in JSON, then the tensors, row-major.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glm.errors import CheckpointError
from glm.weights.digest import digest_start

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST_HEADER = 100_000_000
"""Bytes; the limit of safetensors itself. A longer one is a file of something else."""
_TODO = "copy or download the file again"


@dataclass(frozen=True)
class Place:
    """A tensor in a file: row-major, contiguous, from ``offset`` on (bytes from the start of the file)."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> "Place":
        """Rows ``start`` to ``stop`` of the first dimension, which it keeps."""
        assert 0 <= start <= stop <= self.shape[0], (start, stop, self.shape)
        of_one = math.prod(self.shape[1:]) * self.dtype.itemsize
        return Place(self.path, self.offset + start * of_one, self.dtype, (stop - start, *self.shape[1:]))

    def item(self, index: int) -> "Place":
        """One row of the first dimension, without it: an expert of a stack."""
        row = self.rows(index, index + 1)
        return Place(row.path, row.offset, row.dtype, row.shape[1:])

    def read(self) -> Tensor:
        """The tensor, in memory of its own. Raises CheckpointError when the file has become shorter."""
        data = torch.empty(self.nbytes, dtype=torch.uint8)
        if self.nbytes:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                self._fill(file, memoryview(data.numpy()))
        return data.view(self.dtype).reshape(self.shape)

    def digest(self, chunk_bytes: int = 1 << 24) -> str:
        """What tensor_digest gives of it, without holding more than ``chunk_bytes``."""
        digest = digest_start(self.dtype, self.shape)
        buffer = memoryview(bytearray(min(chunk_bytes, self.nbytes)))
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            for start in range(0, self.nbytes, chunk_bytes):
                part = buffer[: min(chunk_bytes, self.nbytes - start)]
                self._fill(file, part)
                digest.update(part)
        return digest.hexdigest()

    def _fill(self, file, buffer: memoryview) -> None:
        """A read may return less than asked for (Linux: 2 GiB at most), so ask again."""
        done = 0
        while done < len(buffer):
            count = file.readinto(buffer[done:])
            if not count:
                raise CheckpointError(
                    str(self.path), f"the file ends at byte {file.tell():,}", f"a tensor from {self.offset:,} to "
                    f"{self.offset + self.nbytes:,}", _TODO,
                )
            done += count


def safetensors_places(path: Path) -> dict[str, Place]:
    """{name: place} of every tensor of a safetensors file, in the order of the file.

    Reads the header only. Raises CheckpointError when it is not one, when the tensors do not cover the rest of the file
    exactly (so a cut or over-long file is found before any byte of it is used), or a data type is unknown.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            _refuse(path, f"{size:,} bytes, of which the header would be {length:,}", "a whole safetensors file")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
        except ValueError as error:  # of JSON, of UTF-8, or a name twice
            _refuse(path, f"a header that is not one: {error}", "a safetensors file")
    if not isinstance(header, dict):
        _refuse(path, f"a header of type {type(header).__name__}", "a safetensors file")
    header.pop("__metadata__", None)
    start = 8 + length
    placed = {name: _place(path, start, name, entry) for name, entry in header.items()}
    ordered = dict(sorted(placed.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    end = start
    for name, place in ordered.items():
        if place.offset != end:
            _refuse(f"{path}: {name}", f"it begins at byte {place.offset:,}", f"byte {end:,}, where the tensor before it ends")
        end += place.nbytes
    if end != size:
        _refuse(path, f"{size:,} bytes", f"{end:,} bytes, which the tensors of its header need")
    return ordered


def safetensors_header(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """The beginning of a safetensors file of ``tensors`` (data type, shape), whose bytes follow in this order.

    Give larger types first: then every tensor begins at a multiple of its type's size, on which some readers insist.
    """
    kinds = {dtype: kind for kind, dtype in _DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _place(path: Path, start: int, name: str, entry: object) -> Place:
    try:
        kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(isinstance(number, int) and number >= 0 for number in (*shape, first, last))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        _refuse(f"{path}: {name}", repr(entry)[:200], "dtype, shape and data_offsets")
    if kind not in _DTYPES:
        _refuse(f"{path}: {name}", f"data type {kind}", f"one of {', '.join(_DTYPES)}")
    place = Place(path, start + first, _DTYPES[kind], shape)
    if last - first != place.nbytes:
        _refuse(f"{path}: {name}", f"{last - first:,} bytes", f"{place.nbytes:,} for {kind} {list(shape)}")
    return place


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """JSON lets the last of two equal names win; here both would claim to be the tensor."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} twice")
    return made


def _refuse(where: object, found: str, expected: str) -> None:
    raise CheckpointError(str(where), found, expected, _TODO)
