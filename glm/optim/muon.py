"""Muon: momentum, then orthogonalisation of each matrix as Hugging Face files know it."""

from dataclasses import dataclass
from typing import Callable

import torch

from glm.optim.newton_schulz import newton_schulz


@dataclass(frozen=True)
class HeadShape:
    """How a fused qkv matrix is interleaved: per group, ``queries`` rows of q, then ``head_dim`` of k and of v."""

    queries: int
    head_dim: int


def split_matrices(name: str, tensor: torch.Tensor, heads: HeadShape) -> tuple[list[torch.Tensor], Callable]:
    """The matrices inside a fused parameter, and the inverse.

    q, k and v are orthogonalised separately, so are gate and up, so is each expert: fused storage is a detail of this
    code base and must not change the mathematics. Returns ([..., m, n] tensors, function from those to the original shape).
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
    names: list[str], params: list[torch.Tensor], grads: list[torch.Tensor], momenta: list[torch.Tensor], *,
    heads: HeadShape, momentum: float, nesterov: bool, steps: int, update_rms: float,
) -> list[torch.Tensor]:
    """The update of each parameter, to be multiplied by the learning rate and subtracted. ``momenta`` change in place.

    Scaled by update_rms * sqrt(max(m, n)), so that an orthogonal m x n update has root mean square ``update_rms``
    (report 2.4; Moonlight, arXiv 2502.16982). Matrices of one shape are orthogonalised in one batch.
    """
    torch._foreach_lerp_(momenta, grads, 1 - momentum)
    directions = torch._foreach_lerp(grads, momenta, momentum) if nesterov else momenta
    pieces, joins = [], []
    for name, direction in zip(names, directions):
        parts, join = split_matrices(name, direction, heads)
        joins.append((len(pieces), len(parts), join))
        pieces.extend(parts)
    done: list[torch.Tensor | None] = [None] * len(pieces)
    for indices in _same_shape(pieces):
        batch = torch.cat([pieces[index].reshape(-1, *pieces[index].shape[-2:]) for index in indices])
        scale = update_rms * max(batch.shape[-2:]) ** 0.5
        results = newton_schulz(batch, steps).mul_(scale)
        counts = [pieces[index].shape[:-2].numel() for index in indices]
        for index, result in zip(indices, results.split(counts)):
            done[index] = result.reshape(pieces[index].shape)
    return [join(done[first:first + count]) for first, count, join in joins]


def _same_shape(pieces: list[torch.Tensor]) -> list[list[int]]:
    shapes: dict[tuple[int, ...], list[int]] = {}
    for index, piece in enumerate(pieces):
        shapes.setdefault(tuple(piece.shape[-2:]), []).append(index)
    return list(shapes.values())
