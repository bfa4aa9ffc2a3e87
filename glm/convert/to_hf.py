"""A checkpoint as a Hugging Face folder, copied by byte ranges from whatever chunks training saved it in: no model is built."""

import math
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Iterator

import torch

from glm.checkpoint import manifest, torch_dist
from glm.checkpoint.run_folder import write_json
from glm.checkpoint.torch_dist import Item
from glm.convert.draft import Draft, fingerprint
from glm.convert.failures import explained
from glm.convert.origins import origins
from glm.convert.pieces import Part, Piece, placement_digest, write
from glm.convert.source import find_source
from glm.convert.stored_rows import StoredRows
from glm.convert.streams import Bytes, Cast, Computed, Stream, is_exact, read
from glm.errors import CheckpointError, NumericsError
from glm.weights.companions import restore_companions
from glm.weights.digest import digest_start, type_name
from glm.weights.fp8 import FP8, fp8_plan, quantise, scale_name, scale_shape
from glm.weights.hf_folder import (
    DTYPES, MANIFEST, Written, file_names, manifest_entry, publish, put_back, require_replaceable, usual_dtype,
    write_configuration, write_index,
)
from glm.weights.hf_shapes import hf_shapes
from glm.weights.name_map import copies, hf_names
from glm.weights.places import safetensors_header


@explained()
def to_hf(
    source: Path, out: Path, *, stage: str | None = None, tokenizer: Path | None = None, with_copies: bool | None = None,
    fp8: bool = False, max_shard_bytes: int = 5_000_000_000, digests: bool = True, workers: int = 2,
) -> Written:
    """Exports the checkpoint that ``source`` means (see find_source) to ``out``, in the type it is stored in.

    A tensor gets the type it had in the folder the checkpoint was imported from; after training the model's, except that
    routers stay float32 unless bfloat16 holds every value of them all. ``tokenizer``: a folder to copy instead of the
    imported model's or the run's. ``with_copies``: repeat embedding and head in the MTP layer; None: if the imported folder
    did. ``fp8``: matrices in FP8 blocks (glm.weights.fp8). Killed or out of space, the same command continues.
    Raises CheckpointError; PlatformError when the disk is full; NumericsError for a value that FP8 blocks cannot hold.
    ``out`` is whole or as it was.
    """
    out = Path(out)
    require_replaceable(out)
    found = find_source(source, stage)
    _require_apart(out, found.checkpoint)
    info, shape = manifest.read_info(found.checkpoint)
    export = _Export(found.checkpoint, with_copies, fp8, max_shard_bytes)
    fingerprinted = partial(fingerprint, found.checkpoint, [manifest.MANIFEST, *export.manifest["files"]])
    pieces = list(export.pieces(digests))
    job = {
        "source": fingerprinted(), "folder": str(found.checkpoint.absolute()), "digests": digests,
        "placement": placement_digest(pieces),
    }
    if digests and not export.is_proven:
        warnings.warn(f"{found.checkpoint} was written without digests: its contents cannot be verified", stacklevel=3)
    with Draft(out.with_name(f".{out.name}.tmp"), job, export.files) as draft:
        put_back(out)
        try:
            write(draft, pieces, export.prove, digests=digests, workers=workers, title="export")
            if fingerprinted() != job["source"]:
                raise CheckpointError(str(found.checkpoint), "it changed while it was read", "files that stay as they are", "begin again")
        except (CheckpointError, NumericsError):
            draft.discard()
            raise
        write_index(draft.folder, {name: [output.name for output in held] for name, held in export.shards.items()}, export.bytes)
        quantisation = export.fp8.config if fp8 else None
        carried = restore_companions(
            found.checkpoint, draft.folder, shape, rotary_base=info.rotary_base, params=export.params, quantization_config=quantisation,
        )
        if tokenizer is None and not (draft.folder / "tokenizer.json").is_file():
            tokenizer = found.tokenizer
        if tokenizer is not None or not carried:
            write_configuration(draft.folder, shape, info.rotary_base, export.params, tokenizer, quantisation)
        write_json(draft.folder / MANIFEST, {
            "source": {"stage": info.stage, "step": info.step, "run_tokens": info.run_tokens},
            "tensors": {
                output.name: manifest_entry(output.dtype, output.shape, draft.done[output.piece][output.part] if digests else None)
                for held in export.shards.values() for output in held
            },
        })
        draft.complete()
        publish(draft.folder, out)
        draft.published(out)
    return Written(tensors=sum(map(len, export.shards.values())), bytes=export.bytes, kept=export.fp8.kept if fp8 else ())


@dataclass(frozen=True)
class _Output:
    """A tensor of the folder. ``part``: which of the parts of its piece; of an FP8 matrix the factors are the second."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    piece: str
    part: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Export:
    """What is written where, and which bytes of the checkpoint go there."""

    def __init__(self, checkpoint: Path, with_copies: bool | None, fp8: bool, max_shard_bytes: int):
        self.checkpoint = checkpoint
        self.manifest = manifest.read_manifest(checkpoint)
        _check_description(checkpoint, self.manifest["files"])
        _, self.shape = manifest.read_info(checkpoint)
        self.params = manifest.stored_params(checkpoint)
        self.sizes = hf_shapes(self.shape)
        self.fp8 = fp8_plan(self.shape) if fp8 else None
        self.stored = torch_dist.tensors(checkpoint)
        self.rows = StoredRows(checkpoint, self.stored)
        self.origins = origins(checkpoint, self.shape, self.params, self.stored)
        form = self.manifest.get("hf", {"copies": False, "dtypes": None})
        self.copies = copies(self.shape) if (form["copies"] if with_copies is None else with_copies) else {}
        self._dtypes = self._routers() if form["dtypes"] is None else form["dtypes"]
        outputs = [output for name in (*hf_names(self.shape), *self.copies) for output in self._outputs(name)]
        self.shards = _sharded(outputs, max_shard_bytes)
        self.bytes = sum(output.nbytes for output in outputs)
        self._headers = {
            file: safetensors_header({output.name: (output.dtype, output.shape) for output in held}) for file, held in self.shards.items()
        }
        self.files = {file: len(self._headers[file]) + sum(output.nbytes for output in held) for file, held in self.shards.items()}

    def pieces(self, digests: bool) -> Iterator[Piece]:
        places, outputs = {}, {}
        for file, held in self.shards.items():
            offset = len(self._headers[file])
            yield Piece(f"header of {file}", (Part(file, 0, (Bytes(self._headers[file]),)),))
            for output in held:
                places[output.name] = (file, offset)
                outputs[output.name] = output
                offset += output.nbytes
        for output in outputs.values():
            if output.part == 0:
                streams, chunks = self._source(output.name)
                proofs = tuple(dict.fromkeys(proof for chunk in chunks for proof in self._proofs(chunk))) if digests else ()
                made = self._quantised(output.name, streams) if output.dtype is FP8 else {output.name: streams}
                parts = tuple(
                    Part(*places[name], streams, partial(digest_start, outputs[name].dtype, outputs[name].shape))
                    for name, streams in made.items()
                )
                yield Piece(output.piece, parts, proofs)

    def prove(self, proof: tuple[str, str]) -> None:
        """That the bytes of a chunk, or of the file that holds it, are those that were written."""
        file, label = proof
        manifest.check_part(self.checkpoint / file, label, manifest.parts(self.manifest["files"][file])[label])

    @property
    def is_proven(self) -> bool:
        """Whether the manifest has digests of all that is read."""
        return all(self._proofs(chunk) for stored in self.stored.values() for chunk in stored.chunks)

    def _proofs(self, chunk: Item) -> list[tuple[str, str]]:
        known = manifest.parts(self.manifest["files"].get(chunk.file, {}))
        return [(chunk.file, label) for label in (chunk.label, "") if label in known]

    def _source(self, name: str) -> tuple[tuple[Stream, ...], list[Item]]:
        """The tensor's bytes in the type it is written in (in the model's if it will be quantised), and the chunks they come from."""
        origin = self.origins[self.copies.get(name, name)]
        found = list(origin.streams(self.rows))
        stored, wanted = self.stored[origin.key].dtype, self._dtype(name)
        streams = tuple(stream for stream, _ in found)
        if stored is not wanted:
            streams = tuple(Cast(stream, stored, wanted, exact=True, where=f"{self.checkpoint}: {name}") for stream in streams)
        return streams, [chunk for _, chunks in found for chunk in chunks]

    def _quantised(self, name: str, streams: tuple[Stream, ...]) -> dict[str, tuple[Stream, ...]]:
        """Values and factors, worked out together when the first of them is written."""
        made = {}

        def values():
            weight = read(streams, self._dtype(name), self.sizes[name])
            made["values"], made["factors"] = quantise(weight, name)
            return made.pop("values")

        nbytes, factors = math.prod(self.sizes[name]), math.prod(scale_shape(self.sizes[name])) * torch.float32.itemsize
        return {name: (Computed(values, nbytes),), scale_name(name): (Computed(lambda: made.pop("factors"), factors),)}

    def _outputs(self, name: str) -> list[_Output]:
        size = self.sizes[name]
        if self.fp8 is None or name not in self.fp8.quantised:
            return [_Output(name, self._dtype(name), size, name)]
        return [_Output(name, FP8, size, name), _Output(scale_name(name), torch.float32, scale_shape(size), name, part=1)]

    def _dtype(self, name: str) -> torch.dtype:
        told = self._dtypes.get(self.copies.get(name, name))
        return usual_dtype(name, self.params) if told is None else getattr(torch, told)

    def _routers(self) -> dict[str, str]:
        """Routers are trained in float32. All are written in the model's type if that holds every value of them, else none."""
        names = [name for name, origin in self.origins.items() if origin.key.endswith(".router.weight")]
        for name in names:
            streams = [stream for stream, _ in self.origins[name].streams(self.rows)]
            if not is_exact(read(streams, torch.float32, self.sizes[name]), DTYPES[self.params]):
                return dict.fromkeys(names, type_name(torch.float32))
        return {}


def _require_apart(out: Path, checkpoint: Path) -> None:
    """An export replaces what lies at ``out``, which must not be what it reads."""
    target, source = out.resolve(), checkpoint.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise CheckpointError(
            str(out), f"it is, holds or lies in the checkpoint {checkpoint}", "a folder apart from what is exported",
            "choose another folder; the source comes first, then where to write",
        )


def _sharded(outputs: list[_Output], limit: int) -> dict[str, list[_Output]]:
    """{file: its tensors}, in the order of the table; within a file larger types first."""
    groups: list[list[_Output]] = []
    size = 0
    for output in outputs:
        if not groups or size + output.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.nbytes
    return {
        file: sorted(group, key=lambda output: -output.dtype.itemsize) for file, group in zip(file_names(len(groups)), groups)
    }


def _check_description(checkpoint: Path, files: dict[str, dict]) -> None:
    """All but the tensors, before anything of it is believed."""
    manifest.check_sizes(checkpoint, files)
    for name, entry in files.items():
        if not name.endswith(".distcp"):
            for label, part in manifest.parts(entry).items():
                manifest.check_part(checkpoint / name, label, part)
