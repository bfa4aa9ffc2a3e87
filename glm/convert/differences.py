"""A checkpoint and a Hugging Face folder compared tensor by tensor, from their bytes: no model, little memory."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from glm.checkpoint import manifest, torch_dist
from glm.convert.origins import Origin, origins
from glm.convert.stored_rows import StoredRows
from glm.convert.streams import BLOCK, read
from glm.weights.digest import digest_start
from glm.weights.fp8 import dequantise, quantise
from glm.weights.hf_reader import HFFolder
from glm.weights.name_map import hf_names


@dataclass(frozen=True)
class Compared:
    """``differing``: the largest absolute difference of each tensor that is not equal; inf where one is not a number."""

    tensors: int
    bytes: int
    """Of the folder's tensors, each once, and their FP8 factors."""
    quantised: int
    """Tensors that are equal after this suite's own rounding to FP8, and no other way."""
    differing: dict[str, float]


def compare(checkpoint: Path, folder: HFFolder, *, workers: int = 2) -> Compared:
    """Compares every tensor of the model. Equal means the same values exactly, in whatever types both sides store them.

    Of a tensor in FP8 the values it is read as must equal the checkpoint's (it was imported from them), or its bytes must
    be what quantising the checkpoint's gives (it was exported). Each worker holds a block of each side, or one FP8 matrix.
    What the folder's manifest tells of a tensor is compared on the way. Raises CheckpointError for a tensor that one side
    does not have, or that is not what the manifest says.
    """
    shape = manifest.read_info(checkpoint)[1]
    stored = torch_dist.tensors(checkpoint)
    rows = StoredRows(checkpoint, stored)
    found = origins(checkpoint, shape, manifest.stored_params(checkpoint), stored)
    names = hf_names(shape)

    def work(name: str) -> tuple[bool, float | None]:
        origin = found[name]
        compare_one = _values if folder.scale_place(name) is None else _fp8
        return compare_one(name, origin, stored[origin.key].dtype, rows, folder)

    with ThreadPoolExecutor(workers, thread_name_prefix="compare") as pool:
        results = dict(zip(names, tqdm(pool.map(work, names), total=len(names), desc="compare", unit="tensor", disable=None)))
    places = [place for name in names for place in (folder.place(name), folder.scale_place(name)) if place is not None]
    return Compared(
        len(names), sum(place.nbytes for place in places), sum(rounded for rounded, _ in results.values()),
        {name: difference for name, (_, difference) in results.items() if difference is not None},
    )


def _values(name: str, origin: Origin, dtype: torch.dtype, rows: StoredRows, folder: HFFolder) -> tuple[bool, float | None]:
    place = folder.place(name)
    digest = digest_start(place.dtype, place.shape) if folder.expected_digest(name) else None
    buffer, worst = memoryview(bytearray(BLOCK)), None
    with place.path.open("rb") as file:
        file.seek(place.offset)
        for stream, _ in origin.streams(rows):
            for block in stream.blocks(buffer):
                ours = torch.frombuffer(block, dtype=dtype)
                beside = bytearray(file.read(ours.numel() * place.dtype.itemsize))
                if digest is not None:
                    digest.update(beside)
                if dtype is place.dtype and block == beside:
                    continue
                apart = _apart(ours, torch.frombuffer(beside, dtype=place.dtype), same_type=dtype is place.dtype)
                if apart is not None:
                    worst = max(worst or 0.0, apart)
    if digest is not None:
        folder.check_digest(name, digest.hexdigest())
    return False, worst


def _fp8(name: str, origin: Origin, dtype: torch.dtype, rows: StoredRows, folder: HFFolder) -> tuple[bool, float | None]:
    ours = read([stream for stream, _ in origin.streams(rows)], dtype, folder.place(name).shape)
    theirs = folder.get(name)
    apart = _apart(ours, theirs, same_type=False)
    if apart is None:
        return False, None
    values, factors = quantise(ours, name)
    exported = torch.equal(values.view(torch.uint8), folder.place(name).read().view(torch.uint8))
    return (True, None) if exported and torch.equal(factors, folder.scale_place(name).read()) else (False, apart)


def _apart(ours: torch.Tensor, theirs: torch.Tensor, *, same_type: bool) -> float | None:
    """The largest absolute difference, None for equal values; -0 is not 0 where the types are the same."""
    ours, theirs = ours.float(), theirs.float()
    if not same_type and torch.equal(ours, theirs):
        return None
    return (ours - theirs).abs().nan_to_num(nan=float("inf")).max().item()
