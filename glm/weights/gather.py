"""A model on its ranks as Hugging Face tensors, and back. All ranks of the expert-parallel group take part."""

from typing import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from glm.errors import CheckpointError
from glm.recipe.sections import Model
from glm.weights.name_map import check_names, rows


def hf_tensors(model: torch.nn.Module, shape: Model, *, to_rank0: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face name, tensor) for every tensor of the model, in the order of the table.

    Every rank must run the iterator to its end: the experts of one layer at a time are gathered over the expert-parallel
    group, so no rank holds more than one tensor of one layer's experts beside its own weights. With ``to_rank0`` only
    rank 0 receives them, and the iterator of the others yields nothing. Data types are the model's, the router bias is
    float32. A tensor may share memory with the parameter: copy what must survive the next optimizer step.
    Raises CheckpointError when model and table differ.
    """
    local = _tensors_of(model, shape)
    keeps = not to_rank0 or dist.get_rank() == 0
    for row in rows(shape):
        tensor = local[row.megatron]
        assert not row.is_router_bias or tensor.dtype is torch.float32, f"{row.megatron} is {tensor.dtype}"
        if row.transform.per_expert:
            tensor = _all_experts(tensor, to_rank0)
        if keeps:
            yield from zip(row.names(range(shape.num_experts)), row.transform.to_hf(tensor, shape), strict=True)


def load_hf_tensors(model: torch.nn.Module, shape: Model, get: Callable[[str], Tensor]) -> None:
    """Fills ``model`` in place from ``get(name)``; each rank asks for its own experts only.

    Values are cast to the model's data type. Raises CheckpointError when model and table differ, or naming a tensor whose
    shape does not fit.
    """
    local = _tensors_of(model, shape)
    for row in rows(shape):
        target = local[row.megatron]
        names = row.names(_own_experts(target) if row.transform.per_expert else ())
        wanted = row.transform.to_hf(torch.empty(target.shape, device="meta"), shape)
        parts = [_checked(name, get(name), part.shape) for name, part in zip(names, wanted, strict=True)]
        target.copy_(row.transform.to_megatron(parts, shape))


def _tensors_of(model: torch.nn.Module, shape: Model) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, detached; exactly those of the table."""
    # state_dict() also brings back the router bias's float32, which Float16Module takes away (router.py:668)
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    check_names(state, [row.megatron for row in rows(shape)], where="megatron model")
    return state


def _all_experts(own: Tensor, to_rank0: bool) -> Tensor:
    """[experts of this rank, ...] of each rank to [all experts, ...], in the order of the ranks."""
    group = parallel_state.get_expert_model_parallel_group()
    size = group.size()
    if size == 1:
        return own
    own = own.contiguous()
    if not to_rank0:
        whole = own.new_empty(size * own.shape[0], *own.shape[1:])
        dist.all_gather_into_tensor(whole, own, group=group)
        return whole
    if 0 not in dist.get_process_group_ranks(group):  # a replica of rank 0's group: nothing to add
        return own
    parts = [torch.empty_like(own) for _ in range(size)] if dist.get_rank() == 0 else None
    dist.gather(own, parts, dst=0, group=group)
    return torch.cat(parts) if parts is not None else own


def _own_experts(stacked: Tensor) -> range:
    count = stacked.shape[0]
    first = parallel_state.get_expert_model_parallel_rank() * count
    return range(first, first + count)


def _checked(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.shape != shape:
        raise CheckpointError(
            name, f"shape {list(tensor.shape)}", f"shape {list(shape)}",
            "use the configuration (config.json) that belongs to these weights",
        )
    return tensor
