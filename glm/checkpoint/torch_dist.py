"""megatron's torch_dist folder as bytes: where each chunk of each tensor lies, and the frame around a chunk to be written.

``.metadata`` is a pickle of torch.distributed.checkpoint's Metadata. A chunk is stored as torch.save writes a tensor: a zip
file of which the tensor's bytes are one uncompressed record. Nothing here reads or holds those bytes.
"""

import io
import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata,
)

from glm.errors import CheckpointError

METADATA = ".metadata"
_TODO = "use a checkpoint of this suite that was written whole"


@dataclass(frozen=True)
class Item:
    """Something stored: a chunk of a tensor, or an object. ``offset`` and ``length`` count bytes of ``file``."""

    key: str
    file: str
    offset: int
    length: int
    dtype: torch.dtype | None = None
    """None for an object, and then the next two are empty."""
    start: tuple[int, ...] = ()
    """The chunk's first index in each dimension of the whole tensor."""
    sizes: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """Unlike those of all other items."""
        return f"{self.key}{list(self.start)}" if self.dtype is not None else self.key


@dataclass(frozen=True)
class Stored:
    """A whole tensor: its chunks cover it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Item, ...]


def items(folder: Path) -> list[Item]:
    """Everything the folder's ``.metadata`` names, in the order of the files. Raises CheckpointError when it cannot be read."""
    metadata = _metadata(folder)
    sizes = {
        (key, tuple(chunk.offsets)): (about.properties.dtype, tuple(chunk.sizes))
        for key, about in metadata.state_dict_metadata.items() if isinstance(about, TensorStorageMetadata)
        for chunk in about.chunks
    }
    found = []
    for index, place in metadata.storage_data.items():
        about = metadata.state_dict_metadata.get(index.fqn)
        at = (index.fqn, index.offset, place.relative_path, place.offset, place.length)
        if isinstance(about, BytesStorageMetadata):
            found.append(Item(index.fqn, place.relative_path, place.offset, place.length))
        elif index.offset is not None and (index.fqn, tuple(index.offset)) in sizes:
            dtype, extent = sizes[index.fqn, tuple(index.offset)]
            found.append(Item(index.fqn, place.relative_path, place.offset, place.length, dtype, tuple(index.offset), extent))
        else:
            raise CheckpointError(f"{folder / METADATA}: {index.fqn}", f"bytes of no known chunk: {at}", "chunks with bytes", _TODO)
    return sorted(found, key=lambda item: (item.file, item.offset))


def tensors(folder: Path) -> dict[str, Stored]:
    """{key: where it is stored} of every tensor. Raises CheckpointError for a chunk without bytes."""
    metadata = _metadata(folder)
    chunks: dict[str, list[Item]] = {}
    for item in items(folder):
        if item.dtype is not None:
            chunks.setdefault(item.key, []).append(item)
    found = {}
    for key, about in metadata.state_dict_metadata.items():
        if isinstance(about, TensorStorageMetadata):
            stored = chunks.get(key, [])
            if len(stored) != len(about.chunks):
                raise CheckpointError(f"{folder / METADATA}: {key}", f"{len(stored)} chunks with bytes", f"{len(about.chunks)}", _TODO)
            found[key] = Stored(about.properties.dtype, tuple(about.size), tuple(stored))
    return found


def data_offset(folder: Path, item: Item) -> int:
    """Where in its file the tensor's own bytes begin, row-major and contiguous. Raises CheckpointError when they do not."""
    path = folder / item.file
    with path.open("rb") as file:
        window = _Window(file, item.offset, item.length)
        try:
            tensor = torch.load(window, map_location="meta", weights_only=True)
            begin = tensor.untyped_storage()._checkpoint_offset
        except (RuntimeError, pickle.UnpicklingError, AttributeError, EOFError, OSError) as error:
            raise CheckpointError(f"{path}: {item.label}", f"{type(error).__name__}: {str(error)[:200]}", "a stored tensor", _TODO) from error
    if tensor.dtype is not item.dtype or tuple(tensor.shape) != item.sizes or not tensor.is_contiguous():
        raise CheckpointError(
            f"{path}: {item.label}", f"{tensor.dtype} {list(tensor.shape)}, strides {tensor.stride()}",
            f"{item.dtype} {list(item.sizes)}, contiguous", _TODO,
        )
    return item.offset + begin + tensor.storage_offset() * tensor.itemsize


def frame(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the bytes of such a tensor. The checksum of the bytes is left 0, as readers ignore it."""
    sink = _Frame()
    with torch.serialization.skip_data():
        torch.save(torch.empty(sizes, dtype=dtype), sink)  # its memory is never touched, so the system gives it none
    before, after = bytes(sink.written[0]), bytes(sink.written[1])
    assert len(sink.written) == 2 and sink.skipped == torch.Size(sizes).numel() * dtype.itemsize, (dtype, sizes, sink.skipped)
    return before, after


def write_metadata(folder: Path, stored: dict[str, Stored]) -> list[str]:
    """Writes what makes a folder of items a checkpoint of weights for megatron's reader; returns the names of the files."""
    state = {
        key: TensorStorageMetadata(
            TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape),
            [ChunkStorageMetadata(torch.Size(item.start), torch.Size(item.sizes)) for item in tensor.chunks],
        )
        for key, tensor in stored.items()
    }
    places = {
        MetadataIndex(item.key, item.start, number): _StorageInfo(item.file, item.offset, item.length)
        for tensor in stored.values() for number, item in enumerate(tensor.chunks)
    }
    with (folder / METADATA).open("wb") as file:
        pickle.dump(Metadata(state, storage_data=places), file)
    torch.save({"rng": torch.empty(0, dtype=torch.uint8)}, folder / "common.pt")  # no generator's state: nothing was trained
    (folder / "metadata.json").write_text(json.dumps({
        "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1,
    }), encoding="utf-8")
    return [METADATA, "common.pt", "metadata.json"]


def _metadata(folder: Path) -> Metadata:
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            return _Unpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(str(path), "no such file", "a checkpoint in megatron's torch_dist format", _TODO) from None
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(str(path), f"{type(error).__name__}: {error}", "a pickled Metadata", _TODO) from error


class _Unpickler(pickle.Unpickler):
    """Makes what a Metadata consists of and nothing else: a pickle can name any function there is."""

    def find_class(self, module: str, name: str):
        value = super().find_class(module, name) if module == "torch" or module.startswith("torch.") else None
        known = module.startswith("torch.distributed.checkpoint.") and isinstance(value, type)
        if not known and value is not torch.Size and value is not torch.serialization._get_layout and not isinstance(value, torch.dtype):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint's metadata")
        return value


class _Frame(io.RawIOBase):
    """Keeps what is written and skips what is skipped: one list entry before and one after."""

    def __init__(self):
        self.written, self.skipped = [bytearray()], 0

    def write(self, data) -> int:
        self.written[-1] += data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_CUR, "skip_data seeks forward only"
        self.skipped += offset
        self.written.append(bytearray())
        return self.tell()

    def tell(self) -> int:
        return self.skipped + sum(map(len, self.written))


class _Window(io.RawIOBase):
    """``length`` bytes of an open file from ``offset`` on, as a file of its own."""

    def __init__(self, file, offset: int, length: int):
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        return self._position

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(memoryview(buffer)[:count])
        self._position += count
        return count
