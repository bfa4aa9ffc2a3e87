"""Writing a Hugging Face folder: shards of bounded size, configuration, tokenizer, manifest; published whole or not at all."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from glm.checkpoint.run_folder import sync, write_json
from glm.errors import CheckpointError, PlatformError
from glm.recipe.sections import Model
from glm.weights.digest import tensor_digest, type_name
from glm.weights.hf_config import config_json
from glm.weights.name_map import check_names, copies, hf_names

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "manifest.json"
CONFIG = "config.json"
PARAMS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
DTYPES = {params: dtype for dtype, params in PARAMS.items()}


@dataclass(frozen=True)
class Written:
    """What a folder holds."""

    tensors: int
    bytes: int
    kept: tuple[str, ...] = ()
    """Modules that FP8 was wanted for, but which do not divide into blocks (fp8.Fp8Plan)."""


def write_folder(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shape: Model, *, rotary_base: int, tokenizer: Path | None = None,
    max_shard_bytes: int = 5_000_000_000, with_copies: bool = False, source: dict[str, object] | None = None,
) -> Written:
    """Writes ``tensors`` (Hugging Face names, as hf_tensors yields them) with all a reader needs.

    No more than ``max_shard_bytes`` and one tensor are held at a time. ``with_copies`` repeats embedding and head in the
    MTP layer, as GLM-4.5's released files do and GLM-4.6's do not. ``source`` is noted in the manifest. An export of ours
    that is there already is replaced; until then it stays as it is.
    Raises CheckpointError for tensors that are not exactly the model's or a folder that holds something else,
    PlatformError when the disk is full.
    """
    put_back(folder)
    require_replaceable(folder)
    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        shards = _Shards(draft, max_shard_bytes)
        for name, tensor in _with_copies(tensors, shape) if with_copies else tensors:
            shards.add(name, tensor)
        check_names(shards.manifest, [*hf_names(shape), *(copies(shape) if with_copies else ())], where=f"export to {folder}")
        written = shards.close()
        write_configuration(draft, shape, rotary_base, shards.params, tokenizer)
        write_json(draft / MANIFEST, {"source": source or {}, "tensors": shards.manifest})
        publish(draft, folder)
    except (OSError, SafetensorError) as error:
        raise PlatformError(
            str(draft), f"{type(error).__name__}: {error}", "a folder written whole",
            "make room on the disk, or choose another folder; nothing was changed at the destination",
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return written


def usual_dtype(name: str, params: str) -> torch.dtype:
    """The type a tensor has in a released folder: the model's, but float32 for the router's bias."""
    return torch.float32 if name.endswith(".e_score_correction_bias") else DTYPES[params]


class _Shards:
    """Collects tensors and writes a file whenever the next one would exceed the limit."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.manifest: dict[str, dict[str, object]] = {}
        self.params: str = "fp32"
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._bytes = 0
        self._files: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        assert name not in self.manifest, f"{name} twice"
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.limit:
            self._flush()
        # a copy: safetensors refuses tensors that share memory, and the model may train on
        self._pending[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        self._pending_bytes += size
        self._bytes += size
        if name == "model.embed_tokens.weight":
            self.params = PARAMS[tensor.dtype]
        self.manifest[name] = manifest_entry(tensor.dtype, tensor.shape, tensor_digest(tensor))

    def close(self) -> Written:
        """Writes the rest, and the index unless one file holds everything."""
        self._flush()
        finals = file_names(len(self._files))
        for number, final in enumerate(finals):
            (self.folder / _part(number)).rename(self.folder / final)
        write_index(self.folder, dict(zip(finals, self._files)), self._bytes)
        return Written(tensors=len(self.manifest), bytes=self._bytes)

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self.folder / _part(len(self._files))
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes files that only their owner can read
        with path.open("rb") as written:
            os.fsync(written.fileno())
        self._files.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def file_names(count: int) -> list[str]:
    return [SINGLE] if count == 1 else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, files: dict[str, Iterable[str]], total_bytes: int) -> None:
    """``files``: the tensors of each. One file needs no index."""
    if len(files) > 1:
        places = {name: file for file, names in files.items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": places})


def manifest_entry(dtype: torch.dtype, shape: Iterable[int], digest: str | None) -> dict[str, object]:
    """What the manifest says of a tensor; ``digest`` as tensor_digest makes it, None if none was made."""
    return {"dtype": type_name(dtype), "shape": list(shape)} | ({"sha256": digest} if digest is not None else {})


def _part(number: int) -> str:
    return f"part-{number:05d}"


def _with_copies(tensors: Iterable[tuple[str, Tensor]], shape: Model) -> Iterable[tuple[str, Tensor]]:
    originals: dict[str, Tensor] = {}
    wanted = copies(shape)
    for name, tensor in tensors:
        if name in wanted.values():
            originals[name] = tensor
        yield name, tensor
    for name, original in wanted.items():
        yield name, originals[original]


def write_configuration(
    draft: Path, shape: Model, rotary_base: int, params: str, tokenizer: Path | None, quantization_config: dict | None = None,
) -> None:
    """config.json, generation_config.json and the tokenizer's files, if there is one."""
    stop, pad = None, None
    if tokenizer is not None:
        stop, pad = _copy_tokenizer(tokenizer, draft, shape)
    write_json(draft / CONFIG, config_json(
        shape, rotary_base=rotary_base, params=params, eos_token_ids=stop, pad_token_id=pad,
    ) | ({"quantization_config": quantization_config} if quantization_config else {}))
    write_json(draft / "generation_config.json", {
        "do_sample": True, "temperature": 1.0, "top_p": 1.0, "eos_token_id": stop, "pad_token_id": pad,
    })


def _copy_tokenizer(tokenizer: Path, draft: Path, shape: Model) -> tuple[list[int], int]:
    """Copies the tokenizer's files; returns what ends a reply, and the padding token."""
    from glm.tokenizer import load_tokenizer, stop_token_ids

    loaded = load_tokenizer(tokenizer)
    if len(loaded) > shape.vocab_size:
        raise CheckpointError(
            str(tokenizer), f"{len(loaded)} tokens", f"at most model.vocab_size, {shape.vocab_size}",
            "export with the tokenizer the model was trained with",
        )
    for path in sorted(tokenizer.iterdir()):
        if path.is_file() and path.name not in (CONFIG, MANIFEST, INDEX) and path.suffix != ".safetensors":
            shutil.copyfile(path, draft / path.name)
    stop = stop_token_ids(loaded)
    return stop, stop[0]


def require_replaceable(folder: Path) -> None:
    """Raises CheckpointError for anything at ``folder`` but an export of ours or an empty folder; a checkpoint is no export."""
    if folder.exists() and not _is_export(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            str(folder), "it exists and is no earlier export", "a new folder, an empty one, or an earlier export",
            "choose another folder, or remove this one yourself",
        )


def _is_export(folder: Path) -> bool:
    """Checkpoints have a manifest of the same name, but one of files, and files of tensors that no export has."""
    if (folder / ".metadata").exists() or any(folder.glob("*.distcp")):
        return False
    try:
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # what cannot be recognised is not replaced
    return isinstance(told, dict) and "tensors" in told


def publish(draft: Path, folder: Path) -> None:
    """Puts ``draft`` in the place of ``folder``. Between the two renames the earlier export lies beside it, see ``put_back``."""
    earlier = _earlier(folder)
    if folder.exists():
        shutil.rmtree(earlier, ignore_errors=True)
        folder.rename(earlier)
    draft.rename(folder)
    sync(folder.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Gives an earlier export its place again, if ``publish`` was killed between its renames."""
    if _earlier(folder).exists() and not folder.exists():
        _earlier(folder).rename(folder)


def _earlier(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
