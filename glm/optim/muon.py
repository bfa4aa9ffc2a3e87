"""Muon: momentum, then orthogonalisation of each matrix."""

from dataclasses import dataclass
from typing import Callable

import torch

from glm.recipe.sections import Model, Split
from glm.optim.flops import newton_schulz_flops
from glm.optim.newton_schulz import Coefficients, Cut, newton_schulz, newton_schulz_shards


BUCKET_ELEMENTS = 1 << 26
"""How much is orthogonalised or sent at once, 256 MB in fp32, unless one matrix is larger."""
CACHED_ELEMENTS = 1 << 17
"""How much a CPU orthogonalises at once: its cache holds that and its products, and small matrices are done twice as fast."""


@dataclass(frozen=True)
class Fused:
    """How parameters that hold several matrices are stored, and which of these are orthogonalised apart.

    A qkv matrix is interleaved: per group, ``queries`` rows of q, then ``head_dim`` of k and of v. Gate lies above up.
    """

    queries: int
    head_dim: int
    split: Split = Split()

    @classmethod
    def of(cls, shape: Model, split: Split = Split()) -> "Fused":
        return cls(shape.num_attention_heads // shape.num_query_groups * shape.head_dim, shape.head_dim, split)


def split_matrices(name: str, tensor: torch.Tensor, cut: Cut | None, fused: Fused) -> tuple[list[torch.Tensor], Cut | None, Callable]:
    """The matrices inside a parameter, how they are cut, and the inverse.

    Each expert is a matrix of its own; q, k and v, gate and up are where ``fused.split`` says so: how they are stored must not change
    the mathematics. Returns ([..., m, n] tensors, their cut, function from those to the original shape). A tensor-parallel
    shard gives shards of those matrices: it holds whole query groups (so that single heads are not cut), or its part of gate above
    that of up. Fused, the whole matrix has these parts one after the other: its rows in another order, which orthogonalisation follows.
    """
    if name.endswith("linear_qkv.weight") and fused.split.qkv != "fused":
        rows = [fused.queries, fused.head_dim, fused.head_dim]
        parts = [part.flatten(0, 1) for part in tensor.unflatten(0, (-1, sum(rows))).split(rows, dim=1)]

        def join(done: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([part.unflatten(0, (-1, height)) for part, height in zip(done, rows)], dim=1).flatten(0, 1)

        if fused.split.qkv == "separate":
            return parts, cut, join
        heads = [part.unflatten(0, (-1, fused.head_dim)) for part in parts]
        return heads, None, lambda done: join([part.flatten(0, 1) for part in done])
    if name.endswith(("linear_fc1.weight", "experts.weight1")) and fused.split.gate_up == "separate":
        return list(tensor.chunk(2, dim=-2)), cut, lambda done: torch.cat(done, dim=-2)
    return [tensor], cut, lambda done: done[0]


@torch.no_grad()
def muon_updates(
    names: list[str], grads: list[torch.Tensor], momenta: list[torch.Tensor], cuts: list[Cut | None], *,
    fused: Fused, momentum: float, nesterov: bool, polynomials: Coefficients, update_rms: float,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """The update of each parameter, to be multiplied by the learning rate and subtracted. ``momenta`` change in place.

    Scaled by update_rms * sqrt(max(m, n)) of the whole m x n matrix, so that an orthogonal update has root mean square
    ``update_rms`` (report 2.4; Moonlight, arXiv 2502.16982). Matrices of one shape are orthogonalised in one batch.
    ``dtype`` is that of the orthogonalisation. Needs three times the memory of the parameters, and at most four times BUCKET_ELEMENTS.
    ``cuts`` says which parameters are tensor-parallel shards; then this is collective, with the same names in the same order.
    """
    torch._foreach_lerp_(momenta, grads, 1 - momentum)
    directions = torch._foreach_lerp(grads, momenta, momentum) if nesterov else momenta
    pieces, piece_cuts, joins = [], [], []
    for name, direction, cut in zip(names, directions, cuts):
        parts, cut, join = split_matrices(name, direction, cut, fused)
        joins.append((len(pieces), len(parts), join))
        pieces.extend(parts)
        piece_cuts.extend([cut] * len(parts))
    done: list[torch.Tensor | None] = [None] * len(pieces)
    for indices in _alike(pieces, piece_cuts):
        cut = piece_cuts[indices[0]]
        batch = torch.cat([pieces[index].reshape(-1, *pieces[index].shape[-2:]) for index in indices])
        scale = update_rms * max(whole_shape(batch, cut)) ** 0.5
        at_once = min(CACHED_ELEMENTS, BUCKET_ELEMENTS) if batch.is_cpu and not cut else BUCKET_ELEMENTS
        for part in batch.split(max(at_once // batch[0].numel(), cut.group.size() if cut else 1)):
            rounded = part.to(dtype)
            part.copy_(newton_schulz_shards(rounded, cut, polynomials) if cut else newton_schulz(rounded, polynomials)).mul_(scale)
        counts = [pieces[index].shape[:-2].numel() for index in indices]
        for index, result in zip(indices, batch.split(counts)):
            done[index] = result.reshape(pieces[index].shape)
    return [join(done[first:first + count]) for first, count, join in joins]


def muon_flops(name: str, shard: torch.Tensor, cut: Cut | None, fused: Fused, steps: int) -> int:
    """What ``muon_updates`` spends on the whole parameter of which this rank holds ``shard``."""
    parts, part_cut, _ = split_matrices(name, torch.empty_like(shard, device="meta"), cut, fused)
    ranks = cut.group.size() if cut and not part_cut else 1    # matrices that are not cut: every rank of the tensor group has its own
    return ranks * sum(part.shape[:-2].numel() * newton_schulz_flops(*whole_shape(part, part_cut), steps) for part in parts)


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
