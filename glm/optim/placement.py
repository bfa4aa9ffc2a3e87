"""Where a parameter of this rank stands in the layout: which ranks hold copies of it, and which hold its other shards."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from glm.optim.newton_schulz import Cut


@dataclass(frozen=True)
class Placement:
    """Of one parameter on this rank."""

    copies: dist.ProcessGroup
    """Ranks with the same values; optimizer state is divided over them."""
    cut: Cut | None
    """How a tensor-parallel shard lies in the whole; None when this rank holds whole matrices."""
    distinct: bool
    """Whether no other tensor-parallel rank, and no stage before, has these values too."""
    counted: bool
    """Whether this rank's values count in a sum over the whole model, in which every number counts once."""
    first: bool
    """Whether this is the shard that counts when whole tensors are counted."""


def placement(parameter: torch.nn.Parameter) -> Placement:
    """Read from megatron's attributes on ``parameter`` and from its process groups.

    Experts are copied over the expert-data-parallel ranks and cut over the expert-tensor-parallel ones; everything else over
    the data x context-parallel and the tensor-parallel ones. The MTP stage's copy of the embedding does not count.
    """
    expert = getattr(parameter, "is_stacked_expert", False)
    if expert:
        copies = parallel_state.get_expert_data_parallel_group()
        tensor = parallel_state.get_expert_tensor_parallel_group()
    else:
        copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
        tensor = parallel_state.get_tensor_model_parallel_group()
    is_cut = tensor.size() > 1 and getattr(parameter, "tensor_model_parallel", False)
    distinct = not getattr(parameter, "shared_embedding", False) and (is_cut or tensor.rank() == 0)
    counted = copies.rank() == 0 and distinct
    first_experts = not expert or parallel_state.get_expert_model_parallel_rank() == 0
    return Placement(
        copies=copies,
        cut=Cut(tensor, parameter.partition_dim - parameter.dim()) if is_cut else None,
        distinct=distinct,
        counted=counted,
        first=counted and tensor.rank() == 0 and first_experts,
    )
