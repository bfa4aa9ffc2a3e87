"""Initial weights that do not depend on the layout: each tensor, and each expert, has a seed of its own name."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from megatron.core import parallel_state

from glm.model.chunks import named_parameters
from glm.model.shards import Shard, shard_of
from glm.recipe.sections import Model


def initialize(chunks: Sequence[torch.nn.Module], *, seed: int, shape: Model) -> None:
    """Fills every parameter in place.

    Matrices: normal with ``init_std``; those that write into the residual stream (attention output, down projections)
    with init_std / sqrt(2 * num_layers), megatron's default. Norm weights 1, biases 0. A tensor-parallel shard takes its
    slice of the draw of the whole matrix, which is held one at a time.
    """
    residual_std = shape.init_std / math.sqrt(2 * shape.num_layers)
    for name, parameter in named_parameters(chunks):
        if parameter.dim() == 1:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = residual_std if name.endswith(("linear_proj.weight", "linear_fc2.weight", "experts.weight2")) else shape.init_std
        shard = shard_of(name, parameter)
        if getattr(parameter, "is_stacked_expert", False):
            shard = replace(shard, dim=max(0, shard.dim - 1))    # of one expert
            first = parallel_state.get_expert_model_parallel_rank() * parameter.shape[0]
            for index, expert in enumerate(parameter.data.unbind(0)):
                _normal(expert, std, f"{seed}/{name}/{first + index}", shard)
        else:
            _normal(parameter.data, std, f"{seed}/{name}", shard)


def _normal(tensor: torch.Tensor, std: float, name: str, shard: Shard) -> None:
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    drawn = torch.randn(shard.whole_shape(tensor.shape), generator=generator, dtype=torch.float32)
    tensor.copy_(shard.cut(drawn) * std)
