"""Which rank keeps the optimizer state of which parameter.

State is divided over the ranks that hold copies of a parameter (data parallel), by whole parameters: Newton-Schulz needs
whole matrices, so a finer cut would have to be gathered again, and a layer's experts are one parameter.
"""

from typing import NamedTuple, Sequence


class Cost(NamedTuple):
    """What one parameter costs its owner."""

    flops: int
    """Of orthogonalisation, a step; 0 under AdamW."""
    bytes: int
    """Optimizer state held."""


def owners(costs: Sequence[Cost], ranks: int) -> list[int]:
    """The owner of each parameter, in [0, ``ranks``): a pure function, so every rank comes to the same answer.

    Longest processing time first: the costliest matrix goes to the rank with the least work so far; then parameters that
    need no orthogonalisation even out the bytes. No rank gets more than 4/3 of the best possible work (Graham 1969).
    """
    owner = [0] * len(costs)
    flops, held = [0] * ranks, [0] * ranks
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index].flops, -costs[index].bytes, index)):
        cost = costs[index]
        loads = zip(flops, held) if cost.flops else zip(held)
        rank = min(enumerate(loads), key=lambda entry: (entry[1], entry[0]))[0]
        owner[index] = rank
        flops[rank] += cost.flops
        held[rank] += cost.bytes
    return owner
