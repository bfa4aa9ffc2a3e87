"""Where the rows of Hugging Face tensors stand in megatron's, found by sending row numbers through the table's transforms.

Every transform of the table moves whole rows (of the first dimension; of an expert's matrix the second), so a conversion
is copying runs of rows, and nothing here knows how QKV or gate and up are laid out.
"""

from dataclasses import dataclass

import torch

from glm.recipe.sections import Model
from glm.weights.name_map import Row

_FAR = 1 << 40
"""Between the row numbers of two tensors, so that a run never goes from one into the other."""


@dataclass(frozen=True)
class Run:
    """``count`` rows that follow each other on both sides."""

    part: int
    """Which of the row's Hugging Face tensors, of one expert."""
    part_row: int
    row: int
    """In the megatron tensor, or in one expert's matrix of it."""
    count: int


@dataclass(frozen=True)
class Arrangement:
    """One megatron tensor as rows of Hugging Face tensors; alike for all its experts."""

    shape: tuple[int, ...]
    """Of the whole megatron tensor, whatever the layout it was trained in."""
    experts: int | None
    """Its first dimension if that counts experts."""
    runs: tuple[Run, ...]
    """In the order of ``row``; together they are every row once."""

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape of one expert's matrix, or of the tensor."""
        return self.shape if self.experts is None else self.shape[1:]


def arrangement(row: Row, shape: Model, sizes: dict[str, tuple[int, ...]]) -> Arrangement:
    """``sizes``: hf_shapes(shape)."""
    parts = [sizes[name] for name in row.names([0])]
    numbers = [
        (torch.arange(size[0]) + number * _FAR).reshape(-1, *(1 for _ in size[1:])) for number, size in enumerate(parts)
    ]
    order = row.transform.to_megatron(numbers, shape).flatten()
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), (order.diff() != 1).nonzero().flatten() + 1, torch.tensor([len(order)])])
    runs = tuple(
        Run(int(order[begin]) // _FAR, int(order[begin]) % _FAR, begin, end - begin)
        for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    )
    matrix = (len(order), *parts[0][1:])
    if not row.transform.per_expert:
        return Arrangement(matrix, None, runs)
    return Arrangement((shape.num_experts, *matrix), shape.num_experts, runs)
