"""Muon: momentum, then orthogonalisation of each matrix as Hugging Face files know it."""

from dataclasses import dataclass
from typing import Callable

import torch

from glm.recipe.sections import Model
from glm.optim.newton_schulz import Cut, newton_schulz, newton_schulz_flops, newton_schulz_shards


BUCKET_ELEMENTS = 1 << 26
"""How much is orthogonalised or sent at once, 256 MB in fp32, unless one matrix is larger."""


@dataclass(frozen=True)
class HeadShape:
    """How a fused qkv matrix is interleaved: per group, ``queries`` rows of q, then ``head_dim`` of k and of v."""

    queries: int
    head_dim: int

    @classmethod
    def of(cls, shape: Model) -> "HeadShape":
        return cls(shape.num_attention_heads // shape.num_query_groups * shape.head_dim, shape.head_dim)


def split_matrices(name: str, tensor: torch.Tensor, heads: HeadShape) -> tuple[list[torch.Tensor], Callable]:
    """The matrices inside a fused parameter, and the inverse.

    q, k and v are orthogonalised separately, so are gate and up, so is each expert: fused storage is a detail of this
    code base and must not change the mathematics. Returns ([..., m, n] tensors, function from those to the original shape).
    A tensor-parallel shard gives shards of those matrices: it holds whole query groups, or its part of gate above that of up.
    """
    if name.endswith("linear_qkv.weight"):
        rows = [heads.queries, heads.head_dim, heads.head_dim]
        grouped = tensor.unflatten(0, (-1, sum(rows)))
        parts = [part.flatten(0, 1) for part in grouped.split(rows, dim=1)]
        return parts, lambda done: torch.cat(
            [part.unflatten(0, (-1, height)) for part, height in zip(done, rows)], dim=1
        ).flatten(0, 1)
    if name.endswith(("linear_fc1.weight", "experts.weight1")):
        return list(tensor.chunk(2, dim=-2)), lambda done: torch.cat(done, dim=-2)
    return [tensor], lambda done: done[0]


@torch.no_grad()
def muon_updates(
    names: list[str], grads: list[torch.Tensor], momenta: list[torch.Tensor], cuts: list[Cut | None], *,
    heads: HeadShape, momentum: float, nesterov: bool, steps: int, update_rms: float,
) -> list[torch.Tensor]:
    """The update of each parameter, to be multiplied by the learning rate and subtracted. ``momenta`` change in place.

    Scaled by update_rms * sqrt(max(m, n)) of the whole m x n matrix, so that an orthogonal update has root mean square
    ``update_rms`` (report 2.4; Moonlight, arXiv 2502.16982). Matrices of one shape are orthogonalised in one batch.
    Needs three times the memory of the parameters, and at most four times BUCKET_ELEMENTS.
    ``cuts`` says which parameters are tensor-parallel shards; then this is collective, with the same names in the same order.
    """
    torch._foreach_lerp_(momenta, grads, 1 - momentum)
    directions = torch._foreach_lerp(grads, momenta, momentum) if nesterov else momenta
    pieces, piece_cuts, joins = [], [], []
    for name, direction, cut in zip(names, directions, cuts):
        parts, join = split_matrices(name, direction, heads)
        joins.append((len(pieces), len(parts), join))
        pieces.extend(parts)
        piece_cuts.extend([cut] * len(parts))
    done: list[torch.Tensor | None] = [None] * len(pieces)
    for indices in _alike(pieces, piece_cuts):
        cut = piece_cuts[indices[0]]
        batch = torch.cat([pieces[index].reshape(-1, *pieces[index].shape[-2:]) for index in indices])
        together = max(BUCKET_ELEMENTS // batch[0].numel(), cut.group.size() if cut else 1)
        for part in batch.split(together):
            part.copy_(newton_schulz_shards(part, cut, steps) if cut else newton_schulz(part, steps))
        batch.mul_(update_rms * max(whole_shape(batch, cut)) ** 0.5)
        counts = [pieces[index].shape[:-2].numel() for index in indices]
        for index, result in zip(indices, batch.split(counts)):
            done[index] = result.reshape(pieces[index].shape)
    return [join(done[first:first + count]) for first, count, join in joins]


def muon_flops(name: str, shard: torch.Tensor, cut: Cut | None, heads: HeadShape, steps: int) -> int:
    """What ``muon_updates`` spends on the whole parameter of which this rank holds ``shard``."""
    parts, _ = split_matrices(name, torch.empty_like(shard, device="meta"), heads)
    return sum(part.shape[:-2].numel() * newton_schulz_flops(*whole_shape(part, cut), steps) for part in parts)


def whole_shape(shard: torch.Tensor, cut: Cut | None) -> tuple[int, int]:
    """(m, n) of the matrices of which ``shard`` [..., m', n'] is a part."""
    shape = list(shard.shape[-2:])
    if cut:
        shape[cut.dim] *= cut.group.size()
    return shape[0], shape[1]


def _alike(pieces: list[torch.Tensor], cuts: list[Cut | None]) -> list[list[int]]:
    """Indices of the pieces that can go through Newton-Schulz together."""
    alike: dict[tuple, list[int]] = {}
    for index, (piece, cut) in enumerate(zip(pieces, cuts)):
        alike.setdefault((*piece.shape[-2:], cut), []).append(index)
    return list(alike.values())
