"""Starts ranks, and says how far what they trained is from what one rank trained."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.layout.cases import Case
from tests.layout.training import Trained

ROOT = Path(__file__).resolve().parents[2]
LOSS = 5e-6
"""Absolute, over all steps; losses are about 5.8, whose fp32 rounding is 2.4e-7: sums of 128 tokens in another order."""
GRADIENT = 5e-6
"""Norm of the difference over the norm, of each tensor, on the first step: fp32 rounding of sums in another order."""
WEIGHT = 1e-5
"""The same of the weights after five steps, router biases included."""
LATE_GRADIENT = 5e-5
"""The same of the gradient after five steps, on weights that differ by rounding already."""


@dataclass(frozen=True)
class Difference:
    """Largest over all steps, or over all tensors with the tensor's name."""

    loss: float
    mtp_loss: float
    evaluation: float
    gradient: tuple[float, str]
    late_gradient: tuple[float, str]
    weight: tuple[float, str]
    equal_gradients: int
    """Tensors whose gradient is equal bit for bit."""
    gradients: int

    @property
    def too_large(self) -> list[str]:
        """What is beyond its tolerance; empty for a layout that does the same."""
        found = {
            "loss": (self.loss, LOSS), "MTP loss": (self.mtp_loss, LOSS), "loss of an evaluation": (self.evaluation, LOSS),
            f"gradient of {self.gradient[1]}": (self.gradient[0], GRADIENT), f"weight {self.weight[1]}": (self.weight[0], WEIGHT),
            f"late gradient of {self.late_gradient[1]}": (self.late_gradient[0], LATE_GRADIENT),
        }
        return [f"{what} differs by {size:.1e} (allowed {limit:.0e})" for what, (size, limit) in found.items() if not size <= limit]


def run_ranks(cases: list[Case], out: Path) -> list[Trained]:
    """Trains ``cases``, all of one number of ranks, one after the other in the same processes."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.layout.rank", str(out), *(json.dumps(case.as_json()) for case in cases)]
    places = {"WORLD_SIZE": str(cases[0].ranks), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(command, cwd=ROOT, stdout=(out / f"rank{rank}.log").open("w"), stderr=subprocess.STDOUT,
                         env=os.environ | places | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(cases[0].ranks)
    ]
    try:
        codes = [process.wait(timeout=240 + 60 * len(cases)) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    if any(codes):
        raise AssertionError("\n".join((out / f"rank{rank}.log").read_text()[-3000:] for rank in range(len(ranks))))
    return [Trained(**torch.load(out / f"{number}.pt")) for number in range(len(cases))]


def difference(found: Trained, expected: Trained) -> Difference:
    equal = sum(torch.equal(found.gradients[name], expected.gradients[name]) for name in expected.gradients)
    return Difference(
        loss=_largest(found.losses, expected.losses), mtp_loss=_largest(found.mtp_losses, expected.mtp_losses),
        evaluation=abs(found.evaluation - expected.evaluation), gradient=_worst(found.gradients, expected.gradients),
        late_gradient=_worst(found.late_gradients, expected.late_gradients), weight=_worst(found.weights, expected.weights),
        equal_gradients=equal, gradients=len(expected.gradients),
    )


def _largest(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def _worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    assert found.keys() == expected.keys()
    sizes = {
        name: ((found[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-12)).item()
        for name, tensor in expected.items()
    }
    name = max(sizes, key=lambda one: (sizes[one] != sizes[one], sizes[one]))    # NaN is the worst
    return sizes[name], name
