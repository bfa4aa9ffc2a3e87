"""Loading checkpoints of a training stage, every byte verified first, and saving one at once.

A checkpoint is a folder ``step_00000120``. It is written under another name, digested, and renamed: what has the final name
is complete (glm/checkpoint/writer.py).
"""

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingException

from glm.checkpoint.manifest import (  # noqa: F401 - the parts that need no megatron, under this name for trainers
    MANIFEST, CheckpointInfo, checkpoint_steps, digest_files, newest_checkpoint, read_info, step_folder, stored_params, verify,
)
from glm.checkpoint.state import sharded_state
from glm.checkpoint.writer import CheckpointWriter
from glm.errors import CheckpointError
from glm.platform import active
from glm.recipe.sections import Model
from glm.runtime import Runtime


def save(folder: Path, info: CheckpointInfo, shape: Model, chunks, optimizer, runtime: Runtime, keep: int) -> Path:
    """Writes one checkpoint of the model chunks of all ranks and returns when it is there. See CheckpointWriter."""
    writer = CheckpointWriter(folder, runtime, keep)
    writer.begin(info, shape, chunks, optimizer)
    return writer.finish().path


def find_fault(checkpoint: Path) -> CheckpointError | None:
    """What is wrong with the checkpoint's bytes, the same answer on all ranks, of which each reads its part; None: nothing."""
    fault, proved = None, True
    try:
        proved = verify(checkpoint, dist.get_rank(), dist.get_world_size())
    except CheckpointError as error:
        fault = error
    if not proved and dist.get_rank() == 0:
        warnings.warn(f"{checkpoint} was written without digests: sizes of its files compared, their contents not verified", stacklevel=2)
    faults: list[CheckpointError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    return next((fault for fault in faults if fault is not None), None)


def load(checkpoint: Path, chunks, optimizer=None, *, verified: bool = False) -> CheckpointInfo:
    """Loads weights, and with ``optimizer`` its state and the generator's, into place; verifies every byte first unless that was done."""
    fault = None if verified else find_fault(checkpoint)
    if fault is not None:
        raise fault
    state = sharded_state(chunks, optimizer)
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
