"""Checkpoints of a training stage: megatron's distributed format, published whole or not at all.

A checkpoint is a folder ``step_00000120``. It is written as ``.step_00000120.tmp``, digested, and renamed: what has the
final name is complete. Loading verifies every file against the manifest first.
"""

import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from glm.checkpoint.manifest import (  # noqa: F401 - the parts that need no megatron, under this name for trainers
    MANIFEST, CheckpointInfo, checkpoint_steps, digest_files, newest_checkpoint, read_info, step_folder, stored_params, verify,
)
from glm.checkpoint.run_folder import write_json
from glm.errors import CheckpointError, PlatformError
from glm.platform import active
from glm.recipe.sections import Model
from glm.runtime import Runtime


def save(folder: Path, info: CheckpointInfo, shape: Model, chunks, optimizer, runtime: Runtime, keep: int) -> Path:
    """Writes one checkpoint of the model chunks of all ranks and removes the oldest beyond ``keep``. ``optimizer`` None: weights only.

    Raises PlatformError when the disk is full; what was there before is untouched.
    """
    final = folder / step_folder(info.step)
    draft = folder / f".{step_folder(info.step)}.tmp"
    state = _sharded_state(chunks, optimizer)
    _require_space(folder, state, runtime)
    if runtime.is_first:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    dist.barrier()
    state["rng"] = active().rng_state()  # alike on all ranks: nothing random is drawn after the weights
    try:
        serialization.save(state, str(draft))
        if runtime.is_first:
            _publish(draft, final, info, shape, _params(chunks))
            for step in checkpoint_steps(folder)[:-keep]:
                shutil.rmtree(folder / step_folder(step))
    except (OSError, RuntimeError, CheckpointingException, CheckpointException) as error:  # a writer's death is a RuntimeError
        reason = str(error).strip().splitlines()[-1][:300]
        free = shutil.disk_usage(folder).free
        raise PlatformError(
            str(draft), f"{type(error).__name__}: {reason} ({free / 1e6:.0f} MB free)", "a checkpoint written whole",
            "make room on the disk and run the same command again; earlier checkpoints are intact",
        ) from error
    dist.barrier()
    return final


def load(checkpoint: Path, chunks, optimizer=None) -> CheckpointInfo:
    """Loads weights, and with ``optimizer`` its state and the generator's, into place. Every file is verified first."""
    if not verify(checkpoint):
        warnings.warn(f"{checkpoint} was written without digests: sizes of its files compared, their contents not verified", stacklevel=2)
    state = _sharded_state(chunks, optimizer)
    state["rng"] = torch.empty(0)
    try:
        loaded = serialization.load(state, str(checkpoint))
    except (CheckpointingException, KeyError, RuntimeError) as error:
        raise CheckpointError(
            str(checkpoint), f"{type(error).__name__}: {str(error)[:400]}",
            "tensors with the names and shapes of the recipe's model",
            "use the recipe the checkpoint was made with (its recipe.json lies beside it)",
        ) from error
    for number, chunk in enumerate(chunks):
        incompatible = chunk.load_state_dict(loaded[f"model{number}"], strict=False)
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


def _sharded_state(chunks, optimizer) -> dict:
    """Tensors by chunk of this rank; their keys in the checkpoint count the layers of the whole model."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = {}
    for number, chunk in enumerate(chunks):
        # _extra_state is empty or FP8 history of one kernel; without it a checkpoint fits every kernel and every converter
        sharded = chunk.sharded_state_dict(metadata=metadata)
        state[f"model{number}"] = {key: value for key, value in sharded.items() if not key.endswith("_extra_state")}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(dict(state))
    return state


def _params(chunks) -> str:
    return "bf16" if next(chunks[0].parameters()).dtype is torch.bfloat16 else "fp32"


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
    write_json(draft / MANIFEST, {
        "info": asdict(info), "model": shape.model_dump(), "params": params, "files": digest_files(draft),
    })
    if final.exists():
        shutil.rmtree(final)
    draft.replace(final)
