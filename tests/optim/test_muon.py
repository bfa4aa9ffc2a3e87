"""Muon against a float64 reference and against torch.optim.Muon."""

import pytest
import torch

from glm.optim.grad_norm import squared_norm
from glm.optim.muon import Fused, muon_updates, split_matrices
from glm.optim.newton_schulz import COEFFICIENTS, newton_schulz, polynomials

FUSED = Fused(queries=16, head_dim=8)
SIMPLE = polynomials("simple", 5)
SETTINGS = dict(fused=FUSED, momentum=0.95, nesterov=True, polynomials=SIMPLE, update_rms=0.2)


def reference_newton_schulz(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The same polynomial on the singular values, from an exact decomposition in float64."""
    u, s, vt = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    ((a, b, c),) = COEFFICIENTS["simple"]
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (16, 16)])
def test_newton_schulz_is_the_polynomial_of_the_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = reference_newton_schulz(matrix)
    assert (newton_schulz(matrix, SIMPLE).double() - expected).norm() < 1e-5 * expected.norm()
    assert (newton_schulz(matrix, polynomials("simple", 4)).double() - expected).norm() > 1e-2 * expected.norm()


def test_singular_values_end_near_one():
    matrix = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(newton_schulz(matrix, SIMPLE))
    assert values.min() > 0.6 and values.max() < 1.25


@pytest.mark.parametrize("name, shape", [
    ("decoder.layers.0.self_attention.linear_qkv.weight", (64, 24)),  # two groups of 16 + 8 + 8 rows
    ("decoder.layers.0.mlp.linear_fc1.weight", (40, 24)),
    ("decoder.layers.1.mlp.experts.weight1", (4, 40, 24)),
    ("decoder.layers.0.self_attention.linear_proj.weight", (24, 16)),
])
def test_split_matrices_join_to_the_original(name, shape):
    tensor = torch.randn(shape)
    parts, _, join = split_matrices(name, tensor, None, FUSED)
    assert torch.equal(join(parts), tensor)
    assert sum(part.numel() for part in parts) == tensor.numel()


def test_experts_are_orthogonalised_one_by_one():
    gradient = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(2))
    name = "decoder.layers.1.mlp.experts.weight1"
    together = muon_updates([name], [gradient], [torch.zeros_like(gradient)], [None], **SETTINGS)[0]
    for expert in range(3):
        gate, up = gradient[expert].chunk(2)
        expected = torch.cat([reference_newton_schulz(half) * 0.2 * 24**0.5 for half in (gate, up)])
        # the first momentum buffer is a multiple of the gradient, and the direction does not depend on its scale
        assert (together[expert].double() - expected).norm() < 1e-4 * expected.norm()


def test_updates_follow_torch_muon_within_its_bfloat16_rounding():
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(32, 48, generator=generator)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Muon(
        [theirs], lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.1, ns_steps=5, adjust_lr_fn="match_rms_adamw",
    )
    ours, momentum = start.clone(), torch.zeros_like(start)
    for _ in range(4):
        gradient = torch.randn(32, 48, generator=generator)
        theirs.grad = gradient.clone()
        optimizer.step()
        update = muon_updates(["linear_proj.weight"], [gradient], [momentum], [None], **SETTINGS)[0]
        ours.mul_(1 - 0.02 * 0.1).sub_(update, alpha=0.02)
    moved = (theirs.detach() - start).norm()
    assert (ours - theirs.detach()).norm() < 0.03 * moved


def test_one_update_is_that_of_a_float64_reference():
    """Momentum, Nesterov, orthogonalisation and scale, on the second step so that the buffer is not a multiple of the gradient."""
    generator = torch.Generator().manual_seed(4)
    gradients = [torch.randn(40, 24, generator=generator) for _ in range(2)]
    momentum, exact = torch.zeros(40, 24), torch.zeros(40, 24, dtype=torch.float64)
    for gradient in gradients:
        update = muon_updates(["linear_proj.weight"], [gradient], [momentum], [None], **SETTINGS)[0]
        exact = 0.95 * exact + 0.05 * gradient.double()
    direction = 0.05 * gradients[1].double() + 0.95 * exact
    expected = 0.2 * 40**0.5 * reference_newton_schulz(direction)
    assert (update.double() - expected).norm() < 1e-5 * expected.norm()
    assert (update.double() - 0.2 * 40**0.5 * reference_newton_schulz(exact)).norm() > 1e-2 * expected.norm()


def test_the_norm_of_a_large_gradient_is_exact():
    tensors = [torch.randn(1000, 2000, generator=torch.Generator().manual_seed(5)), torch.ones(3)]
    expected = sum(tensor.double().square().sum() for tensor in tensors)
    assert abs(squared_norm(tensors, torch.device("cpu")) / expected - 1).item() < 1e-12


def test_the_size_of_a_bucket_changes_nothing(monkeypatch):
    gradient = torch.randn(5, 40, 24, generator=torch.Generator().manual_seed(6))
    name = "decoder.layers.1.mlp.experts.weight1"
    batches, orthogonalise = [], newton_schulz
    monkeypatch.setattr("glm.optim.muon.newton_schulz", lambda part, steps: batches.append(len(part)) or orthogonalise(part, steps))
    updates = []
    for elements in (1 << 26, 3 * 20 * 24, 1):
        monkeypatch.setattr("glm.optim.muon.BUCKET_ELEMENTS", elements)
        updates += muon_updates([name], [gradient], [torch.zeros_like(gradient)], [None], **SETTINGS)
    assert batches == [10] + [3, 3, 3, 1] + [1] * 10
    assert torch.equal(updates[0], updates[1]) and torch.equal(updates[0], updates[2])
