"""What a checkpoint holds, as megatron's sharded tensors: the model chunks of this rank and the optimizer's state."""

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import is_main_replica


def sharded_state(chunks, optimizer) -> dict:
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


def params_type(chunks) -> str:
    """``fp32`` or ``bf16``."""
    return "bf16" if next(chunks[0].parameters()).dtype is torch.bfloat16 else "fp32"


def stored_bytes(value) -> int:
    """Bytes of the tensors of which this rank writes the copy that is kept."""
    if isinstance(value, dict):
        return sum(stored_bytes(item) for item in value.values())
    data = value if isinstance(value, torch.Tensor) else getattr(value, "data", None)
    if not isinstance(data, torch.Tensor) or not is_main_replica(getattr(value, "replica_id", 0)):
        return 0
    return data.numel() * data.element_size()
