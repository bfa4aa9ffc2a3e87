"""Checkpoints of a training stage: megatron's distributed format, published whole or not at all.

A checkpoint is a folder ``step_00000120``. It is written as ``.step_00000120.tmp``, digested, and renamed: what has the
final name is complete. Loading verifies every file against the manifest first.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from glm.checkpoint.run_folder import write_json
from glm.errors import CheckpointError, PlatformError
from glm.platform import active
from glm.recipe.sections import Model
from glm.runtime import Runtime

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself, readable without loading it."""

    stage: str
    step: int
    stage_tokens: int
    run_tokens: int
    rotary_base: int
    megatron: dict = field(default_factory=dict)
    """The recipe's section of that name: whoever rebuilds the model needs it too."""


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in ``folder``, oldest first."""
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*") if (path / MANIFEST).exists())


def newest_checkpoint(folder: Path) -> Path | None:
    steps = checkpoint_steps(folder)
    return folder / _name(steps[-1]) if steps else None


def read_info(checkpoint: Path) -> tuple[CheckpointInfo, Model]:
    """The checkpoint's own description and the shape of its model. Raises CheckpointError when it is not one."""
    manifest = _manifest(checkpoint)
    try:
        return CheckpointInfo(**manifest["info"]), Model(**manifest["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            str(checkpoint / MANIFEST), f"{type(error).__name__}: {str(error)[:200]}", "the manifest of this release",
            "use the release that wrote it, or make the checkpoint again",
        ) from error


def stored_params(checkpoint: Path) -> str:
    """``fp32`` or ``bf16``: the type the checkpoint's weights are stored in. Raises CheckpointError when it is not one."""
    return _manifest(checkpoint)["params"]


def save(folder: Path, info: CheckpointInfo, shape: Model, model, optimizer, runtime: Runtime, keep: int) -> Path:
    """Writes one checkpoint from all ranks and removes the oldest beyond ``keep``. ``optimizer`` None: weights only.

    Raises PlatformError when the disk is full; what was there before is untouched.
    """
    final = folder / _name(info.step)
    draft = folder / f".{_name(info.step)}.tmp"
    state = _sharded_state(model, optimizer)
    _require_space(folder, state, runtime)
    if runtime.is_first:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    dist.barrier()
    state["rng"] = active().rng_state()  # alike on all ranks: nothing random is drawn after the weights
    try:
        serialization.save(state, str(draft))
        if runtime.is_first:
            _publish(draft, final, info, shape, "bf16" if next(model.parameters()).dtype is torch.bfloat16 else "fp32")
            for step in checkpoint_steps(folder)[:-keep]:
                shutil.rmtree(folder / _name(step))
    except (OSError, RuntimeError, CheckpointingException, CheckpointException) as error:  # a writer's death is a RuntimeError
        reason = str(error).strip().splitlines()[-1][:300]
        free = shutil.disk_usage(folder).free
        raise PlatformError(
            str(draft), f"{type(error).__name__}: {reason} ({free / 1e6:.0f} MB free)", "a checkpoint written whole",
            "make room on the disk and run the same command again; earlier checkpoints are intact",
        ) from error
    dist.barrier()
    return final


def load(checkpoint: Path, model, optimizer=None) -> CheckpointInfo:
    """Loads weights, and with ``optimizer`` its state and the generator's, into place. Every file is verified first."""
    verify(checkpoint)
    state = _sharded_state(model, optimizer)
    state["rng"] = torch.empty(0)
    try:
        loaded = serialization.load(state, str(checkpoint))
    except (CheckpointingException, KeyError, RuntimeError) as error:
        raise CheckpointError(
            str(checkpoint), f"{type(error).__name__}: {str(error)[:400]}",
            "tensors with the names and shapes of the recipe's model",
            "use the recipe the checkpoint was made with (its recipe.json lies beside it)",
        ) from error
    incompatible = model.load_state_dict(loaded["model"], strict=False)
    missing = [key for key in incompatible.missing_keys if not key.endswith("_extra_state")]
    if missing or incompatible.unexpected_keys:
        raise CheckpointError(
            str(checkpoint), f"missing {missing[:5]}, unexpected {incompatible.unexpected_keys[:5]}",
            "exactly the tensors of the model", "use the recipe the checkpoint was made with",
        )
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        if loaded["rng"].numel():
            active().set_rng_state(loaded["rng"])
    return read_info(checkpoint)[0]


def verify(checkpoint: Path) -> None:
    """Compares every file with the manifest's size and digest. Raises CheckpointError naming the first that differs."""
    for name, expected in _manifest(checkpoint)["files"].items():
        path = checkpoint / name
        if not path.exists():
            _corrupt(path, "no such file", f"{expected['bytes']} bytes")
        if path.stat().st_size != expected["bytes"]:
            _corrupt(path, f"{path.stat().st_size} bytes", f"{expected['bytes']} bytes")
        digest = _digest(path)
        if digest != expected["sha256"]:
            _corrupt(path, f"sha256 {digest[:16]}…", f"sha256 {expected['sha256'][:16]}…")


def _corrupt(path: Path, found: str, expected: str) -> None:
    raise CheckpointError(
        str(path), found, expected,
        f"the file changed after it was written; remove {path.parent} to continue from the checkpoint before it",
    )


def _sharded_state(model, optimizer) -> dict:
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"])
    return state


def _require_space(folder: Path, state: dict, runtime: Runtime) -> None:
    """All ranks stop together, before anything is written, when the disk cannot hold the checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _local_tensors(state)
    needed = torch.tensor(float(sum(tensor.numel() * tensor.element_size() for tensor in tensors)), dtype=torch.float64)
    needed = needed.to(active().device)
    dist.all_reduce(needed)  # an upper bound: replicated tensors are written once
    free = torch.tensor(float(shutil.disk_usage(folder).free), dtype=torch.float64, device=needed.device)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    if free.item() < needed.item():
        raise PlatformError(
            str(folder), f"{free.item() / 1e6:.1f} MB free", f"up to {needed.item() / 1e6:.1f} MB for one checkpoint",
            "make room and run the same command again; earlier checkpoints are intact",
        )


def _local_tensors(value) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _local_tensors(item)]
    if isinstance(value, torch.Tensor):
        return [value]
    data = getattr(value, "data", None)
    return [data] if isinstance(data, torch.Tensor) else []


def _publish(draft: Path, final: Path, info: CheckpointInfo, shape: Model, params: str) -> None:
    files = {
        str(path.relative_to(draft)): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(draft.rglob("*")) if path.is_file()
    }
    write_json(draft / MANIFEST, {
        "info": asdict(info), "model": shape.model_dump(), "params": params, "files": files,
    })
    if final.exists():
        shutil.rmtree(final)
    draft.replace(final)


def _manifest(checkpoint: Path) -> dict:
    path = checkpoint / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            str(checkpoint), "no manifest.json", "a checkpoint folder such as RUN/stages/STAGE/checkpoints/step_00000120",
            "give the folder of a run or of one of its checkpoints",
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(str(path), str(error), "JSON", f"remove {checkpoint} to continue from the one before it") from error


def _digest(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _name(step: int) -> str:
    return f"step_{step:08d}"
