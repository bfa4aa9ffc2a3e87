"""Initial weights that do not depend on the layout: each tensor, and each expert, has a seed of its own name."""

import hashlib
import math

import torch


def initialize(model: torch.nn.Module, *, seed: int, init_std: float, num_layers: int) -> None:
    """Fills every parameter in place.

    Matrices: normal with ``init_std``; those that write into the residual stream (attention output, down projections)
    with init_std / sqrt(2 * num_layers), megatron's default. Norm weights 1, biases 0. Tensor-parallel shards would
    need the slice of the full draw; this release refuses them (glm.runtime).
    """
    residual_std = init_std / math.sqrt(2 * num_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = residual_std if name.endswith(("linear_proj.weight", "linear_fc2.weight", "experts.weight2")) else init_std
        if getattr(parameter, "is_stacked_expert", False):
            first = _expert_rank(model, name) * parameter.shape[0]
            for index, expert in enumerate(parameter.data.unbind(0)):
                _normal(expert, std, f"{seed}/{name}/{first + index}")
        else:
            _normal(parameter.data, std, f"{seed}/{name}")


def _expert_rank(model: torch.nn.Module, name: str) -> int:
    return model.get_submodule(name.rpartition(".")[0]).ep_rank


def _normal(tensor: torch.Tensor, std: float, name: str) -> None:
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float32) * std)
