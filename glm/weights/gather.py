"""A model on its ranks as Hugging Face tensors on rank 0, and back, under every layout."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from glm.errors import CheckpointError
from glm.model.chunks import named_parameters, named_tensors
from glm.model.shards import WHOLE, Shard, shard_of
from glm.platform import active
from glm.recipe.sections import Model
from glm.weights.name_map import Row, check_names, rows


def hf_tensors(chunks: Sequence[torch.nn.Module], shape: Model) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face name, tensor) on rank 0 for every tensor of the model, in the order of the table.

    Every rank must run the iterator to its end; those of others yield nothing. One tensor, or the experts of one layer, is
    gathered at a time: over tensor-parallel, then expert-parallel ranks, then from its pipeline stage. Data types are the
    model's, the router bias is float32. A tensor may share memory with the parameter: copy what must survive the next
    optimizer step. Raises CheckpointError when model and table differ.
    """
    local, shards, owners = _tensors_of(chunks, shape)
    for row in rows(shape):
        whole = _to_rank0(local.get(row.megatron), shards.get(row.megatron, WHOLE), row, owners[row.megatron])
        if whole is not None:
            assert not row.is_router_bias or whole.dtype is torch.float32, f"{row.megatron} is {whole.dtype}"
            yield from zip(row.names(range(shape.num_experts)), row.transform.to_hf(whole, shape), strict=True)


def load_hf_tensors(chunks: Sequence[torch.nn.Module], shape: Model, get: Callable[[str], Tensor]) -> None:
    """Fills the model in place from ``get(name)``; each rank asks for the tensors and experts that it holds a part of.

    Values are cast to the model's data type. Raises CheckpointError when model and table differ, or naming a tensor whose
    shape does not fit.
    """
    local, shards, _ = _tensors_of(chunks, shape)
    for row in rows(shape):
        if row.megatron not in local:
            continue
        target, shard = local[row.megatron], shards.get(row.megatron, WHOLE)
        names = row.names(_own_experts(target) if row.transform.per_expert else ())
        wanted = row.transform.to_hf(torch.empty(shard.whole_shape(target.shape), device="meta"), shape)
        parts = [_checked(name, get(name), part.shape) for name, part in zip(names, wanted, strict=True)]
        target.copy_(shard.cut(row.transform.to_megatron(parts, shape)))


def _tensors_of(chunks, shape: Model) -> tuple[dict[str, Tensor], dict[str, Shard], dict[str, int]]:
    """This rank's tensors by name, how they are cut, and the pipeline stage that holds each tensor of the model."""
    local = named_tensors(chunks)
    shards = {name: shard_of(name, parameter) for name, parameter in named_parameters(chunks)}
    group = parallel_state.get_pipeline_model_parallel_group()
    held: list[list[str]] = [[] for _ in range(group.size())]
    dist.all_gather_object(held, list(local), group=group)
    owners = {name: stage for stage in reversed(range(len(held))) for name in held[stage]}
    check_names(owners, [row.megatron for row in rows(shape)], where="megatron model")
    return local, shards, owners


def _to_rank0(own: Tensor | None, shard: Shard, row: Row, stage: int) -> Tensor | None:
    """The whole tensor on rank 0, None elsewhere.

    Of a stage only the ranks that share a replica with its first one take part: pipeline stages are the outermost division
    of the ranks (megatron's order tp-cp-ep-dp-pp), so the first of each lies in rank 0's pipeline group.
    """
    stages = parallel_state.get_pipeline_model_parallel_group()
    first = dist.get_world_size() // stages.size() * stage
    held = own if own is not None and parallel_state.get_pipeline_model_parallel_rank() == stage else None
    if held is not None and shard.size > 1:
        parts = _gathered(held, shard.group)
        held = shard.join(parts) if parts else None
    if held is not None and row.transform.per_expert:
        parts = _gathered(held, parallel_state.get_expert_model_parallel_group())
        held = torch.cat(parts) if parts else None
    rank = dist.get_rank()
    if first and rank in (0, first):
        if rank == first:
            dist.send_object_list([(list(held.shape), held.dtype)], dst=0)
            dist.send(held.contiguous(), dst=0)
            return None
        told = [None]
        dist.recv_object_list(told, src=first)
        held = torch.empty(told[0][0], dtype=told[0][1], device=active().device)
        dist.recv(held, src=first)
    return held if rank == 0 else None


def _gathered(part: Tensor, group: dist.ProcessGroup) -> list[Tensor] | None:
    """Every rank's ``part`` on the first rank of ``group``, None on the others."""
    if group.size() == 1:
        return [part]
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(part, parts, group=group, group_dst=0)
    return parts


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
