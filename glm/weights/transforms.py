"""How one megatron tensor becomes several Hugging Face ones, and back. Pure functions; each pair is inverse to the other.

Legend: H hidden, D head dimension, N query heads, G query groups, F inner width, E experts.
Cut tensors may share memory with the tensor they were cut from; joined ones are new.
"""

from dataclasses import dataclass
from typing import Callable, Sequence

import torch
from torch import Tensor

from glm.recipe.sections import Model


def same(tensor: Tensor, shape: Model) -> tuple[Tensor, ...]:
    return (tensor,)


def only(tensors: Sequence[Tensor], shape: Model) -> Tensor:
    (tensor,) = tensors
    return tensor


def split_qkv(fused: Tensor, shape: Model) -> tuple[Tensor, ...]:
    """[G * (N/G + 2) * D, ...] to q [N * D, ...], k and v [G * D, ...]; the same for weight and bias.

    megatron keeps each query group together: its N/G query heads, then its key, then its value head.
    """
    per_group = shape.num_attention_heads // shape.num_query_groups
    grouped = fused.unflatten(0, (shape.num_query_groups, per_group + 2, shape.head_dim))
    parts = grouped.split((per_group, 1, 1), dim=1)
    return tuple(part.flatten(0, 2).contiguous() for part in parts)


def fuse_qkv(parts: Sequence[Tensor], shape: Model) -> Tensor:
    """Inverse of split_qkv."""
    grouped = [part.unflatten(0, (shape.num_query_groups, -1, shape.head_dim)) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 2)


def split_gate_up(fused: Tensor, shape: Model) -> tuple[Tensor, ...]:
    """[2F, H], gate above up, to two [F, H]."""
    return fused.chunk(2, dim=0)


def fuse_gate_up(parts: Sequence[Tensor], shape: Model) -> Tensor:
    return torch.cat(tuple(parts), dim=0)


def split_experts_gate_up(stacked: Tensor, shape: Model) -> tuple[Tensor, ...]:
    """[E, 2F, H] to gate 0, up 0, gate 1, up 1, ..., each [F, H]."""
    return tuple(part for expert in stacked.unbind(0) for part in split_gate_up(expert, shape))


def stack_experts_gate_up(parts: Sequence[Tensor], shape: Model) -> Tensor:
    """Inverse of split_experts_gate_up."""
    return torch.stack([fuse_gate_up(pair, shape) for pair in zip(parts[0::2], parts[1::2], strict=True)])


def split_experts_down(stacked: Tensor, shape: Model) -> tuple[Tensor, ...]:
    """[E, H, F] to one [H, F] an expert."""
    return stacked.unbind(0)


def stack_experts_down(parts: Sequence[Tensor], shape: Model) -> Tensor:
    return torch.stack(tuple(parts))


@dataclass(frozen=True)
class Transform:
    """A change of layout in both directions."""

    to_hf: Callable[[Tensor, Model], tuple[Tensor, ...]]
    to_megatron: Callable[[Sequence[Tensor], Model], Tensor]
    per_expert: bool = False
    """The first dimension counts experts, and a rank holds its share of them."""


SAME = Transform(same, only)
QKV = Transform(split_qkv, fuse_qkv)
GATE_UP = Transform(split_gate_up, fuse_gate_up)
EXPERTS_GATE_UP = Transform(split_experts_gate_up, stack_experts_gate_up, per_expert=True)
EXPERTS_DOWN = Transform(split_experts_down, stack_experts_down, per_expert=True)
