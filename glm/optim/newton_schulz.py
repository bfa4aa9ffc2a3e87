"""Approximate orthogonalisation of matrices by Newton-Schulz iteration."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Keller Jordan's quintic; the report does not give GLM-4.5's. Singular values end between about 0.68 and 1.19."""


@dataclass(frozen=True)
class Cut:
    """Matrices cut over the ranks of ``group``, in rank order, along ``dim``: -2 for rows, -1 for columns."""

    group: dist.ProcessGroup
    dim: int


def newton_schulz(matrices: torch.Tensor, steps: int = 5, eps: float = 1e-7) -> torch.Tensor:
    """[..., m, n] -> [..., m, n] with all singular values near 1 and the same singular vectors.

    Runs in the dtype given. Works on the smaller Gram matrix: see ``newton_schulz_flops``.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def newton_schulz_flops(m: int, n: int, steps: int = 5) -> int:
    """Of one m x n matrix."""
    short, long = sorted((m, n))
    return steps * (4 * short * short * long + 2 * short**3)


def newton_schulz_shards(shards: torch.Tensor, cut: Cut, steps: int = 5) -> torch.Tensor:
    """This rank's shards [B, m, n] of B matrices -> its shards of the B orthogonalised matrices.

    Collective over ``cut.group``. The matrices are divided among the ranks: each gathers its share whole, and gives the
    shards of the result back. Against gathering all of them everywhere that is 1/ranks of the work, and less traffic.
    """
    ranks, rank = cut.group.size(), cut.group.rank()
    share = [len(shards) // ranks + (other < len(shards) % ranks) for other in range(ranks)]
    received = shards.new_empty(ranks * share[rank], *shards.shape[1:])
    dist.all_to_all_single(received, shards.contiguous(), [share[rank]] * ranks, share, group=cut.group)
    whole = torch.cat(received.unflatten(0, (ranks, share[rank])).unbind(0), dim=cut.dim)
    done = torch.stack(newton_schulz(whole, steps).chunk(ranks, dim=cut.dim)).flatten(0, 1)
    result = torch.empty_like(shards, memory_format=torch.contiguous_format)
    dist.all_to_all_single(result, done, share, [share[rank]] * ranks, group=cut.group)
    return result
