"""Which part of a whole tensor a rank's parameter is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, set_tensor_model_parallel_attributes,
)

from glm.model.vocabulary import TABLES


@dataclass(frozen=True)
class Shard:
    """Part ``rank`` of ``size`` along ``dim``, of each of ``blocks`` equal blocks: gate above up is cut in two blocks."""

    dim: int = 0
    rank: int = 0
    size: int = 1
    blocks: int = 1
    group: dist.ProcessGroup | None = None
    """The ranks that hold the other parts; None for a tensor that is whole."""
    length: int | None = None
    """Of the whole tensor along ``dim``, if that is less than the parts together: the last parts end in zeros."""

    def whole_shape(self, shape: Sequence[int]) -> list[int]:
        """Of a part's shape."""
        along = self.length or shape[self.dim] * self.size
        return [along if dim == self.dim else length for dim, length in enumerate(shape)]

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """The rank's part of ``whole``."""
        missing = -whole.shape[self.dim] % (self.size * self.blocks)
        if missing:
            assert self.length is not None, f"{list(whole.shape)} in {self.size} parts of {self.blocks} blocks along {self.dim}"
            shape = [missing if dim == self.dim else length for dim, length in enumerate(whole.shape)]
            whole = torch.cat([whole, whole.new_zeros(shape)], dim=self.dim)
        parts = [block.chunk(self.size, dim=self.dim)[self.rank] for block in whole.chunk(self.blocks, dim=self.dim)]
        return torch.cat(parts, dim=self.dim)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Inverse of ``cut`` over all ranks: ``parts`` in their order."""
        blocks = zip(*(part.chunk(self.blocks, dim=self.dim) for part in parts))
        whole = torch.cat([piece for block in blocks for piece in block], dim=self.dim)
        return whole if self.length is None else whole.narrow(self.dim, 0, self.length)


WHOLE = Shard()


def mark_shards(model: torch.nn.Module, vocab_size: int) -> None:
    """Notes on each weight of a tensor-parallel layer along which dimension it is cut, on padded tables where tokens end.

    megatron does so only while it draws initial weights (tensor_parallel/layers.py:855), which this suite does itself.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)) and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, True, 0, 1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(module.weight, True, 1, 1)
    for name, parameter in model.named_parameters():
        if name in TABLES:
            parameter.whole_length = vocab_size


def shard_of(name: str, parameter: torch.nn.Parameter) -> Shard:
    """How tensor parallelism cut ``parameter``; for stacked experts how expert tensor parallelism cut each of them."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return WHOLE
    if getattr(parameter, "is_stacked_expert", False):
        group = parallel_state.get_expert_tensor_parallel_group()
        blocks = 2 if name.endswith("weight1") else 1
    else:
        group = parallel_state.get_tensor_model_parallel_group()
        blocks = 2 if name.endswith("linear_fc1.weight") else 1
    return Shard(
        parameter.partition_dim, group.rank(), group.size(), blocks, group, getattr(parameter, "whole_length", None),
    )
