"""What lies in a checkpoint or a Hugging Face folder: every tensor, from the headers alone; its contents if asked for, in pieces."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Iterator

import torch
from tqdm import tqdm

from glm.checkpoint import manifest, torch_dist
from glm.checkpoint.torch_dist import Stored
from glm.convert.origins import is_weight
from glm.convert.source import find_source
from glm.convert.stored_rows import StoredRows
from glm.convert.streams import BLOCK, Span, Stream
from glm.errors import CheckpointError
from glm.weights.companions import CARRIED, companions
from glm.weights.digest import digest_start, type_name
from glm.weights.hf_folder import CONFIG, INDEX, MANIFEST
from glm.weights.hf_reader import HFFolder
from glm.weights.name_map import rows
from glm.weights.places import Place, safetensors_places

PARTS = {
    "optimizer": ("optimizer.",), "MTP": ("mtp.",), "FP8 factors": ("_scale_inv",), "router": (".mlp.gate.", ".mlp.router."),
    "experts": (".mlp.experts.",), "shared experts": (".shared_experts.",), "dense MLP": (".mlp.",),
    "norms": ("norm.weight", "layernorm"), "attention": (".self_attn.", ".self_attention."),
    "embedding": ("embed_tokens", "embedding."), "head": ("lm_head", "output_layer"),
}
"""A tensor belongs to the first whose words are in its name; all of the MTP layer is MTP."""


@dataclass(frozen=True)
class Entry:
    """One tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    part: str
    files: tuple[str, ...]
    digest: str | None = None
    """See weights.digest.tensor_digest: of the manifest, or computed. None where neither is."""


@dataclass(frozen=True)
class Inspection:
    """What was found. ``odd``: in words, what a reader of these files should know; empty for a healthy folder."""

    path: Path
    kind: str
    entries: tuple[Entry, ...]
    odd: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    """Configuration and tokenizer files."""
    about: dict[str, object] = field(default_factory=dict)

    def totals(self) -> dict[str, tuple[int, int, int]]:
        """{part: (tensors, numbers, bytes)}, the largest first."""
        found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        for entry in self.entries:
            for index, amount in enumerate((1, math.prod(entry.shape), entry.nbytes)):
                found[entry.part][index] += amount
        return dict(sorted(((part, tuple(sums)) for part, sums in found.items()), key=lambda item: -item[1][2]))


def inspect(path: Path, pattern: str = "*", *, stage: str | None = None, digests: bool = False) -> Inspection:
    """Lists the tensors whose names match ``pattern`` (as file names do) of a Hugging Face folder or a checkpoint: ``path``
    itself, or the one it means (see find_source).

    ``digests``: reads every byte of them, a block at a time, to compute digests, to compare them with the manifest, and to
    find tensors that are all zero or hold what is no number. A folder that is torn or incomplete is listed as far as it
    can be read, and ``odd`` says what is wrong. Raises CheckpointError for a path that is neither.
    """
    path = Path(path)
    if (path / torch_dist.METADATA).is_file():
        return _checkpoint(path, pattern, digests)
    if (path / CONFIG).is_file() or any(path.glob("*.safetensors")):
        return _hf_folder(path, pattern, digests)
    if (path / "stages").is_dir() or manifest.checkpoint_steps(path):
        return _checkpoint(find_source(path, stage).checkpoint, pattern, digests)
    raise CheckpointError(
        str(path), "neither config.json nor .metadata", "a Hugging Face folder, a checkpoint (step_*) or a run", "correct the path",
    )


def part_of(name: str, mtp_layer: int | None = None) -> str:
    """``mtp_layer``: the number of the MTP layer in Hugging Face names."""
    if mtp_layer is not None and name.startswith(f"model.layers.{mtp_layer}."):
        return "MTP"
    return next((part for part, words in PARTS.items() if any(word in name for word in words)), "other")


def _hf_folder(path: Path, pattern: str, digests: bool) -> Inspection:
    odd, placed, mtp_layer, folder = [], {}, None, None
    files = sorted(path.glob("*.safetensors"))
    try:
        folder = HFFolder(path)
    except CheckpointError as error:
        odd.append(f"refused for conversion: {error.where}: {error.found}; expected {error.expected}")
    else:
        mtp_layer = folder.shape.num_layers
        of_model = {folder.place(name).path.name for name in folder.names}
        odd += [f"no part of the model: {file.name}" for file in files if file.name not in of_model]
        odd += ["no MTP layer: num_nextn_predict_layers is 0"] if not folder.shape.num_mtp_layers else []
        files = [file for file in files if file.name in of_model]
    for file in files:
        try:
            found = safetensors_places(file)
        except CheckpointError as error:
            odd.append(f"unreadable: {error.where}: {error.found}; expected {error.expected}")
            continue
        odd += [f"twice: {name}, in {placed[name].path.name} and {file.name}" for name in found.keys() & placed.keys()]
        placed |= found
    used = {place.path.name for place in placed.values()}
    odd += _bias_types((name, place.dtype) for name, place in placed.items())
    wanted = {name: place for name, place in placed.items() if fnmatchcase(name, pattern)}
    entries = tuple(
        Entry(name, type_name(place.dtype), place.shape, place.nbytes, part_of(name, mtp_layer), (place.path.name,),
              folder and folder.expected_digest(name))
        for name, place in wanted.items()
    )
    if digests:
        def streams(name: str) -> Iterator[Stream]:
            yield Span(wanted[name].path, wanted[name].offset, wanted[name].nbytes)

        entries, more = _read(entries, {name: place.dtype for name, place in wanted.items()}, streams)
        odd += more
    beside = tuple(file.name for file in companions(path))
    about = {"manifest": (path / MANIFEST).is_file(), "index": (path / INDEX).is_file(), "files": len(used)}
    return Inspection(path, "Hugging Face folder", entries, tuple(odd), beside, about)


def _checkpoint(path: Path, pattern: str, digests: bool) -> Inspection:
    odd: list[str] = []
    stored = torch_dist.tensors(path)
    wanted = {key: tensor for key, tensor in stored.items() if fnmatchcase(key, pattern)}
    about: dict[str, object] = {}
    try:
        info, shape = manifest.read_info(path)
        about = {"stage": info.stage, "step": info.step, "run_tokens": info.run_tokens, "params": manifest.stored_params(path)}
        files = manifest.read_manifest(path)["files"]
        manifest.check_sizes(path, files)
    except CheckpointError as error:
        odd.append(f"{error.where}: {error.found}; expected {error.expected}")
    else:
        if not all(manifest.parts(entry) for entry in files.values()):
            odd.append("written without digests: a changed byte would not be found")
        if digests:
            odd += _changed(path, files, {chunk.label for tensor in wanted.values() for chunk in tensor.chunks})
        held, expected = {key for key in stored if is_weight(key)}, {row.megatron for row in rows(shape)}
        odd += [f"missing: {name}" for name in sorted(expected - held)] + [f"of no model of its shape: {name}" for name in sorted(held - expected)]
        odd += ["no MTP layer: num_mtp_layers is 0"] if not shape.num_mtp_layers else []
    odd += _bias_types((key, tensor.dtype) for key, tensor in stored.items())
    entries = tuple(
        Entry(key, type_name(tensor.dtype), tensor.shape, math.prod(tensor.shape) * tensor.dtype.itemsize, part_of(key),
              tuple(dict.fromkeys(chunk.file for chunk in tensor.chunks)))
        for key, tensor in wanted.items()
    )
    if digests:
        streams = partial(_stored_streams, path, wanted, StoredRows(path, stored))
        entries, more = _read(entries, {key: tensor.dtype for key, tensor in wanted.items()}, streams)
        odd += more
    carried = tuple(f"{CARRIED}/{file.name}" for file in companions(path / CARRIED)) if (path / CARRIED).is_dir() else ()
    return Inspection(path, "checkpoint", entries, tuple(odd), carried, about)


def _changed(checkpoint: Path, files: dict[str, dict], labels: set[str]) -> Iterator[str]:
    """What the manifest says otherwise of the chunks ``labels`` and of all that is no tensor."""
    for name, entry in files.items():
        for label, part in manifest.parts(entry).items():
            if not label or label in labels:
                try:
                    manifest.check_part(checkpoint / name, label, part)
                except CheckpointError as error:
                    yield f"{error.where}: {error.found}; expected {error.expected}"


def _stored_streams(checkpoint: Path, stored: dict[str, Stored], read_rows: StoredRows, key: str) -> Iterator[Stream]:
    """The whole tensor in row-major order; of experts one matrix after the other."""
    shape = stored[key].shape
    if not shape:
        (chunk,) = stored[key].chunks
        yield Span(checkpoint / chunk.file, torch_dist.data_offset(checkpoint, chunk), chunk.dtype.itemsize)
        return
    for expert in range(shape[0]) if len(shape) == 3 else [None]:
        for stream, _ in read_rows.streams(key, expert, 0, shape[0 if expert is None else 1]):
            yield stream


def _bias_types(tensors: Iterable[tuple[str, torch.dtype]]) -> list[str]:
    """In bfloat16 neighbouring biases are equal and tokens change their experts."""
    return [
        f"router bias in {type_name(dtype)}: {name}" for name, dtype in tensors
        if name.endswith(("e_score_correction_bias", "router.expert_bias")) and dtype is not torch.float32
    ]


def _read(
    entries: tuple[Entry, ...], dtypes: dict[str, torch.dtype], streams: Callable[[str], Iterator[Stream]],
) -> tuple[tuple[Entry, ...], list[str]]:
    """The entries with computed digests, and what is odd with the contents."""
    done, odd, zeros = [], [], []
    buffer = memoryview(bytearray(BLOCK))
    with tqdm(total=sum(entry.nbytes for entry in entries), desc="inspect", unit="B", unit_scale=True, disable=None) as bar:
        for entry in entries:
            dtype = dtypes[entry.name]
            digest, any_set, finite = digest_start(dtype, entry.shape), False, True
            for stream in streams(entry.name):
                for block in stream.blocks(buffer):
                    digest.update(block)
                    values = torch.frombuffer(block, dtype=dtype)
                    any_set = any_set or bool(torch.count_nonzero(values.view(torch.uint8)))
                    finite = finite and (not dtype.is_floating_point or bool(values.float().isfinite().all()))
                    bar.update(len(block))
            if entry.digest not in (None, digest.hexdigest()):
                odd.append(f"other bytes than the manifest says: {entry.name}")
            if not finite:
                odd.append(f"not all finite: {entry.name}")
            if not any_set and entry.nbytes:
                zeros.append(entry.name)
            done.append(Entry(**vars(entry) | {"digest": digest.hexdigest()}))
    return tuple(done), odd + [f"all zero: {name}" for name in zeros]

