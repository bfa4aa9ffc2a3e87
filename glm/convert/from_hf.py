"""A Hugging Face folder as a checkpoint to train on, copied by byte ranges: no model is built, and little is in memory."""

import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Iterator

import torch

from glm.checkpoint import torch_dist
from glm.checkpoint.manifest import MANIFEST, CheckpointInfo, checkpoint_steps, range_digest, step_folder
from glm.checkpoint.run_folder import sync, write_json
from glm.checkpoint.torch_dist import Item, Stored
from glm.convert.draft import Draft, fingerprint
from glm.convert.failures import explained
from glm.convert.pieces import Part, Piece, placement_digest, write
from glm.convert.streams import Bytes, Cast, Computed, Span, Stream
from glm.errors import CheckpointError
from glm.weights.arrangement import Arrangement, arrangement
from glm.weights.companions import CARRIED, carry_companions, companions
from glm.weights.digest import type_name
from glm.weights.hf_folder import DTYPES, INDEX, usual_dtype
from glm.weights.hf_reader import HFFolder
from glm.weights.hf_shapes import hf_shapes
from glm.weights.name_map import copies, hf_names, rows

STAGE = "from_hf"
CHUNK_BYTES = 64 << 20
"""A reader with another layout reads whole chunks that its own part overlaps; a file entry costs about 1.5 KB."""
FILE_BYTES = 2 << 30
_COPIES = "copies in the MTP layer"


@explained()
def from_hf(
    hf_folder: Path, checkpoint_folder: Path, *, params: str | None = None, digests: bool = True, workers: int = 2,
) -> Path:
    """Writes ``checkpoint_folder``/step_00000000: the weights of ``hf_folder`` without an optimizer state.

    ``params`` (fp32 or bf16): the type to store; by default the folder's own. Killed or out of space, the same command
    continues. Raises CheckpointError for a folder that is torn, of another network, or whose tensors are not exactly the
    model's; and if checkpoints are there already. PlatformError when the disk is full.
    """
    checkpoint_folder = Path(checkpoint_folder)
    final = checkpoint_folder / step_folder(0)
    _require_new(final)
    folder = HFFolder(hf_folder)
    source = partial(fingerprint, folder.folder, _files_of(folder))
    plan = _Plan(folder, params or folder.params)
    pieces = list(plan.pieces(digests))
    job = {
        "source": source(), "folder": str(folder.folder.absolute()), "params": plan.params, "digests": digests,
        "placement": placement_digest(pieces),
    }
    with Draft(checkpoint_folder / f".{final.name}.tmp", job, plan.files) as draft:
        try:
            _require_new(final)  # another process may have published it since
            write(draft, pieces, plan.prove, digests=digests, workers=workers, title="import")
            if source() != job["source"]:
                raise CheckpointError(str(folder.folder), "it changed while it was read", "files that stay as they are", "begin again")
        except CheckpointError:
            draft.discard()  # what was copied came from a folder that must change
            raise
        _describe(draft, plan, digests)
        draft.complete()
        draft.folder.rename(final)
        sync(checkpoint_folder)
        draft.published(final)
    return final


def _require_new(final: Path) -> None:
    there = checkpoint_steps(final.parent)
    if there:
        raise CheckpointError(
            str(final.parent), f"{len(there)} checkpoints, up to step {there[-1]}", "a folder without checkpoints",
            "choose a new folder",
        )
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise CheckpointError(
            str(final), f"something else than a checkpoint: no {MANIFEST} in it", "nothing of that name",
            "choose a new folder, or remove this one yourself",
        )


class _Plan:
    """What is stored where, and which bytes of the folder go there."""

    def __init__(self, folder: HFFolder, params: str):
        self.folder, self.shape, self.params = folder, folder.shape, params
        sizes = hf_shapes(self.shape)
        self.rows = {row.megatron: row for row in rows(self.shape)}
        self.arranged = {key: arrangement(row, self.shape, sizes) for key, row in self.rows.items()}
        self.dtypes = {
            key: torch.float32 if ".mlp.router." in key else DTYPES[params]  # routers are float32 in every model, see glm.model
            for key in self.rows
        }
        self.stored, self.files = _laid_out(self.arranged, self.dtypes)

    def pieces(self, digests: bool) -> Iterator[Piece]:
        yield Piece(_COPIES, proofs=(_COPIES,))
        for key, stored in self.stored.items():
            for item in stored.chunks:
                before, after = torch_dist.frame(item.dtype, item.sizes)
                used = list(self._used(key, item))
                streams = (Bytes(before), *(self._stream(name, start, count, item.dtype) for name, start, count in used), Bytes(after))
                proofs = tuple(dict.fromkeys(name for name, _, _ in used)) if digests else ()
                yield Piece(item.label, (Part(item.file, item.offset, streams),), proofs)

    def prove(self, name: str) -> None:
        """That the folder's tensor is what its manifest says; of the MTP layer's copies also that they are copies."""
        if name == _COPIES:
            self.folder.check_copies()
        else:
            self.folder.check(name)

    def _used(self, key: str, item: Item) -> Iterator[tuple[str, int, int]]:
        """(tensor of the folder, first row, rows) in the order of the chunk."""
        row, arranged = self.rows[key], self.arranged[key]
        experts = [None] if arranged.experts is None else range(item.start[0], item.start[0] + item.sizes[0])
        first, count = (item.start[0], item.sizes[0]) if arranged.experts is None else (item.start[1], item.sizes[1])
        for expert in experts:
            names = row.names([expert])
            for run in arranged.runs:
                begin, end = max(run.row, first), min(run.row + run.count, first + count)
                if begin < end:
                    yield names[run.part], run.part_row + begin - run.row, end - begin

    def _stream(self, name: str, start: int, count: int, wanted: torch.dtype) -> Stream:
        place, found = self.folder.place(name), self.folder.dtype(name)
        if self.folder.scale_place(name) is None:
            part = place.rows(start, start + count)
            stream: Stream = Span(part.path, part.offset, part.nbytes)
        else:
            size = count * math.prod(place.shape[1:]) * found.itemsize
            stream = Computed(lambda: self.folder.rows(name, start, count), size)
        return stream if found is wanted else Cast(stream, found, wanted, exact=False, where=f"{place.path}: {name}")


def _laid_out(arranged: dict[str, Arrangement], dtypes: dict[str, torch.dtype]) -> tuple[dict[str, Stored], dict[str, int]]:
    """Every tensor cut into chunks, the chunks into files one after the other; and the sizes of the files."""
    stored, files = {}, {}
    number, offset = 0, 0
    for key, about in arranged.items():
        chunks = []
        for start, sizes in _chunks(about, dtypes[key].itemsize):
            length = sum(map(len, torch_dist.frame(dtypes[key], sizes))) + math.prod(sizes) * dtypes[key].itemsize
            if offset and offset + length > FILE_BYTES:
                number, offset = number + 1, 0
            chunks.append(Item(key, f"__0_{number}.distcp", offset, length, dtypes[key], start, sizes))
            offset += length
            files[chunks[-1].file] = offset
        stored[key] = Stored(dtypes[key], about.shape, tuple(chunks))
    return stored, files


def _chunks(about: Arrangement, itemsize: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(start, sizes): whole experts while they are small, in groups that any number of expert-parallel ranks shares evenly; else rows.

    Cut into powers of two, which is how tensor parallelism cuts: a rank then reads little beside its own rows.
    """
    rest = (0,) * (len(about.matrix) - 1)
    rows, *others = about.matrix
    of_matrix = math.prod(about.matrix) * itemsize
    cuts = 1
    while of_matrix > cuts * CHUNK_BYTES and cuts < rows:
        cuts *= 2
    step = math.ceil(rows / cuts)
    spans = [(first, min(step, rows - first)) for first in range(0, rows, step)]
    if about.experts is None:
        yield from (((first, *rest), (count, *others)) for first, count in spans)
        return
    group = 1
    while cuts == 1 and about.experts % (2 * group) == 0 and 2 * group * of_matrix <= CHUNK_BYTES:
        group *= 2
    for expert in range(0, about.experts, group):
        yield from (((expert, first, *rest), (group, count, *others)) for first, count in spans)


def _files_of(folder: HFFolder) -> list[str]:
    """All that the result depends on."""
    beside = [name for name in (INDEX, MANIFEST) if (folder.folder / name).is_file()]
    weights = {folder.place(name).path.name for name in folder.names}
    return sorted({*weights, *beside, *(path.name for path in companions(folder.folder))})


def _describe(draft: Draft, plan: _Plan, digests: bool) -> None:
    """Writes what makes the pieces a checkpoint: megatron's files, and the manifest from the journal's digests."""
    carried = [f"{CARRIED}/{name}" for name in carry_companions(plan.folder.folder, draft.folder)]
    entries: dict[str, dict] = {name: {"bytes": size} | ({"items": {}} if digests else {}) for name, size in plan.files.items()}
    for name in [*torch_dist.write_metadata(draft.folder, plan.stored), *carried]:
        path = draft.folder / name
        size = path.stat().st_size
        entries[name] = {"bytes": size} | ({"sha256": range_digest(path, 0, size)} if digests else {})
    if digests:
        for item in (item for stored in plan.stored.values() for item in stored.chunks):
            (digest,) = draft.done[item.label]
            entries[item.file]["items"][item.label] = {"offset": item.offset, "bytes": item.length, "sha256": digest}
    info = CheckpointInfo(stage=STAGE, step=0, stage_tokens=0, run_tokens=0, rotary_base=plan.folder.rotary_base)
    write_json(draft.folder / MANIFEST, {
        "info": asdict(info), "model": plan.shape.model_dump(), "params": plan.params, "files": entries, "hf": _form(plan),
    })


def _form(plan: _Plan) -> dict[str, object]:
    """What of the folder's form the weights do not tell, for an export to have it again. ``dtypes``: of unusual tensors; None: converted."""
    folder = plan.folder
    unusual = {
        name: type_name(folder.dtype(name)) for name in hf_names(plan.shape) if folder.dtype(name) is not usual_dtype(name, plan.params)
    }
    return {
        "copies": any(copy in folder.names for copy in copies(plan.shape)), "dtypes": unusual if plan.params == folder.params else None,
    }
