"""Approximate orthogonalisation of matrices by Newton-Schulz iteration."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

Coefficients = tuple[tuple[float, float, float], ...]
"""(a, b, c) of x -> a x + b x^3 + c x^5 on the singular values, one step after the other; further steps repeat the last."""

COEFFICIENTS: dict[str, Coefficients] = {
    "simple": ((3.4445, -4.7750, 2.0315),),
    "quintic": (
        (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": (
        (8.2051, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184), (3.9096, -2.8234, 0.5250), (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985), (1.8726, -1.2307, 0.3585), (1.8564, -1.2132, 0.3568), (1.8750, -1.2500, 0.3750),
    ),
}
"""The report does not give GLM-4.5's. simple: Keller Jordan's; singular values end between about 0.68 and 1.19. quintic: one
polynomial a step, closer to 1 after five (Emerging-Optimizers, megatron's default). polar_express: the best polynomial of each step for
singular values from 1e-3 to 1, with its paper's safety factor of 1.01 (arXiv 2505.16932)."""


@dataclass(frozen=True)
class Cut:
    """Matrices cut over the ranks of ``group``, in rank order, along ``dim``: -2 for rows, -1 for columns."""

    group: dist.ProcessGroup
    dim: int


def polynomials(coefficients: str, steps: int) -> Coefficients:
    """(a, b, c) of each of ``steps`` steps."""
    given = COEFFICIENTS[coefficients]
    return (given + given[-1:] * steps)[:steps]


def newton_schulz(matrices: torch.Tensor, polynomials: Coefficients, eps: float = 1e-7) -> torch.Tensor:
    """[B, m, n] -> [B, m, n] with all singular values near 1 and the same singular vectors.

    Runs in the dtype given, all matrices at once. Works on the smaller Gram matrix: see glm.optim.flops.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT.contiguous() if tall else matrices
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)    # in fp32 the sum is 3e-5 off at 2 million numbers
    x = x / norm.clamp(min=eps).to(x.dtype)
    for a, b, c in polynomials:
        gram = torch.bmm(x, x.mT)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if tall else x


def newton_schulz_shards(shards: torch.Tensor, cut: Cut, polynomials: Coefficients) -> torch.Tensor:
    """This rank's shards [B, m, n] of B matrices -> its shards of the B orthogonalised matrices.

    Collective over ``cut.group``. The matrices are divided among the ranks: each gathers its share whole, and gives the
    shards of the result back. Against gathering all of them everywhere that is 1/ranks of the work, and less traffic.
    """
    ranks, rank = cut.group.size(), cut.group.rank()
    share = [len(shards) // ranks + (other < len(shards) % ranks) for other in range(ranks)]
    received = shards.new_empty(ranks * share[rank], *shards.shape[1:])
    dist.all_to_all_single(received, shards.contiguous(), [share[rank]] * ranks, share, group=cut.group)
    whole = torch.cat(received.unflatten(0, (ranks, share[rank])).unbind(0), dim=cut.dim)
    done = torch.stack(newton_schulz(whole, polynomials).chunk(ranks, dim=cut.dim)).flatten(0, 1)
    result = torch.empty_like(shards, memory_format=torch.contiguous_format)
    dist.all_to_all_single(result, done, share, [share[rank]] * ranks, group=cut.group)
    return result
