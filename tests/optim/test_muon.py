"""Muon against a float64 reference and against torch.optim.Muon."""

import pytest
import torch

from glm.optim.flops import newton_schulz_flops
from glm.optim.grad_norm import squared_norm
from glm.optim.muon import Fused, muon_flops, muon_updates, split_matrices
from glm.optim.newton_schulz import COEFFICIENTS, newton_schulz, polynomials
from glm.recipe.sections import Split
from tests.optim.naive_muon import POLYNOMIALS, last_update, orthogonalised

FUSED = Fused(queries=16, head_dim=8)
SIMPLE = polynomials("simple", 5)
SETTINGS = dict(fused=FUSED, momentum=0.95, nesterov=True, polynomials=SIMPLE, update_rms=0.2)
PARAMETERS = {
    "decoder.layers.0.self_attention.linear_qkv.weight": (64, 24),  # two groups of 16 + 8 + 8 rows
    "decoder.layers.0.self_attention.linear_proj.weight": (24, 32),
    "decoder.layers.0.mlp.linear_fc1.weight": (80, 24),
    "decoder.layers.1.mlp.shared_experts.linear_fc2.weight": (24, 40),
    "decoder.layers.1.mlp.experts.weight1": (4, 40, 24),
    "decoder.layers.1.mlp.experts.weight2": (4, 24, 20),
    "output_layer.weight": (96, 24),
    "decoder.layers.1.mlp.router.weight": (4, 24),
}
SPLITS = [Split(qkv=qkv, gate_up=gate_up) for qkv in ("separate", "per_head", "fused") for gate_up in ("separate", "fused")]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def gradients_of(shape, steps: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def updated(name: str, gradients: list[torch.Tensor], **changes) -> torch.Tensor:
    """The last update, with the momentum of those before."""
    momentum = torch.zeros_like(gradients[0])
    for gradient in gradients:
        (update,) = muon_updates([name], [gradient], [momentum], [None], **SETTINGS | changes)
    return update


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (16, 16)])
def test_newton_schulz_is_the_polynomial_of_the_singular_values(shape, coefficients):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = orthogonalised(matrix, POLYNOMIALS[coefficients])
    assert error(newton_schulz(matrix[None], polynomials(coefficients, 5))[0], expected) < 1e-5
    assert error(newton_schulz(matrix[None], polynomials(coefficients, 4))[0], expected) > 1e-3


def test_a_large_matrix_is_as_exact_as_a_small_one():
    """torch's norm of two million numbers in fp32 is 3e-5 off, and with it would be the update."""
    matrix = torch.randn(192, 10_000, generator=torch.Generator().manual_seed(7))
    assert error(newton_schulz(matrix[None], SIMPLE)[0], orthogonalised(matrix, POLYNOMIALS["simple"])) < 5e-6


@pytest.mark.parametrize("coefficients, steps, lowest, highest", [
    ("simple", 5, 0.6, 1.25), ("quintic", 5, 0.95, 1.05), ("polar_express", 5, 0.85, 1.15), ("polar_express", 8, 0.999, 1.001),
])
def test_singular_values_end_near_one(coefficients, steps, lowest, highest):
    matrix = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(newton_schulz(matrix[None], polynomials(coefficients, steps))[0])
    assert values.min() > lowest and values.max() < highest


def test_steps_beyond_a_set_of_coefficients_repeat_its_last():
    assert polynomials("quintic", 7) == COEFFICIENTS["quintic"] + COEFFICIENTS["quintic"][-1:] * 2
    assert polynomials("polar_express", 5) == COEFFICIENTS["polar_express"][:5] and len(polynomials("simple", 5)) == 5


@pytest.mark.parametrize("name, shape", PARAMETERS.items())
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_split_matrices_join_to_the_original(name, shape, split):
    tensor = torch.randn(shape)
    parts, cut, join = split_matrices(name, tensor, None, Fused(16, 8, split))
    assert cut is None and torch.equal(join(parts), tensor)
    assert sum(part.numel() for part in parts) == tensor.numel()


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_one_update_is_that_of_a_naive_float64_reference_for_every_way_to_split(split):
    """Momentum, Nesterov, orthogonalisation and scale, on the third step so that the buffer is not a multiple of the gradient."""
    for name, shape in PARAMETERS.items():
        gradients = gradients_of(shape)
        expected = last_update(name, gradients, queries=16, head_dim=8, qkv=split.qkv, gate_up=split.gate_up)
        assert error(updated(name, gradients, fused=Fused(16, 8, split)), expected) < 1e-5, name


@pytest.mark.parametrize("wrong", [
    dict(qkv="fused"), dict(qkv="per_head"), dict(gate_up="fused"), dict(coefficients="quintic"), dict(momentum=0.9), dict(update_rms=0.201),
], ids=str)
def test_the_reference_tells_every_choice_from_the_others(wrong):
    name = "decoder.layers.0.mlp.linear_fc1.weight" if "gate_up" in wrong else "decoder.layers.0.self_attention.linear_qkv.weight"
    gradients = gradients_of(PARAMETERS[name])
    assert error(updated(name, gradients), last_update(name, gradients, queries=16, head_dim=8)) < 1e-5
    assert error(updated(name, gradients), last_update(name, gradients, queries=16, head_dim=8, **wrong)) > 1e-3


def test_experts_are_orthogonalised_one_by_one():
    name = "decoder.layers.1.mlp.experts.weight2"
    gradients = gradients_of(PARAMETERS[name])
    together = updated(name, gradients)
    for expert in range(len(together)):
        alone = updated("decoder.layers.0.mlp.linear_fc2.weight", [gradient[expert] for gradient in gradients])
        assert torch.equal(together[expert], alone)
    stacked = orthogonalised(sum(gradients).flatten(0, 1), POLYNOMIALS["simple"])
    assert error(together.flatten(0, 1), stacked) > 0.1, "one tall matrix would be another update"


@pytest.mark.parametrize("shape", [(32, 48), (96, 24), (128, 256)])
def test_updates_follow_torch_muon_within_its_bfloat16_rounding(shape):
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=generator)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Muon(
        [theirs], lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.1, ns_steps=5, adjust_lr_fn="match_rms_adamw",
    )
    ours, momentum = start.clone(), torch.zeros_like(start)
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        theirs.grad = gradient.clone()
        optimizer.step()
        (update,) = muon_updates(["linear_proj.weight"], [gradient], [momentum], [None], **SETTINGS)
        ours.mul_(1 - 0.02 * 0.1).sub_(update, alpha=0.02)
    assert error(ours - start, theirs.detach() - start) < 0.02


def test_in_bfloat16_an_update_is_torch_muons_almost_to_the_bit():
    (gradient,) = gradients_of((128, 256), steps=1)
    theirs = torch.nn.Parameter(torch.zeros(128, 256))
    theirs.grad = gradient.clone()
    torch.optim.Muon([theirs], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    ours, exact = (updated("linear_proj.weight", [gradient], dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert error(ours, -theirs.detach()) < 2e-3 < error(exact, -theirs.detach()) < 0.02


def test_the_norm_of_a_large_gradient_is_exact():
    tensors = [torch.randn(1000, 2000, generator=torch.Generator().manual_seed(5)), torch.ones(3)]
    expected = sum(tensor.double().square().sum() for tensor in tensors)
    assert abs(squared_norm(tensors, torch.device("cpu")) / expected - 1).item() < 1e-12


@pytest.mark.parametrize("shape", [(5, 40, 24), (9, 128, 96), (9, 96, 128)])
def test_the_size_of_a_bucket_and_of_the_cache_change_nothing(monkeypatch, shape):
    """Owners batch other matrices together in every layout."""
    gradients = gradients_of(shape, steps=1)
    name = "decoder.layers.1.mlp.experts.weight1"
    updates = []
    for bucket in (1 << 26, 3 * shape[1] // 2 * shape[2], 1):
        for cache in (1 << 26, 1 << 15, 1):
            monkeypatch.setattr("glm.optim.muon.BUCKET_ELEMENTS", bucket)
            monkeypatch.setattr("glm.optim.muon.CACHED_ELEMENTS", cache)
            updates.append(updated(name, gradients))
    assert all(torch.equal(update, updates[0]) for update in updates)


def test_the_work_of_an_update_is_that_of_its_matrices():
    qkv, whole = "decoder.layers.0.self_attention.linear_qkv.weight", torch.empty(64, 24)
    assert muon_flops(qkv, whole, None, FUSED, 5) == sum(newton_schulz_flops(*shape) for shape in ((32, 24), (16, 24), (16, 24)))
    assert muon_flops(qkv, whole, None, Fused(16, 8, Split(qkv="per_head")), 5) == 8 * newton_schulz_flops(8, 24)
    assert muon_flops(qkv, whole, None, Fused(16, 8, Split(qkv="fused")), 5) == newton_schulz_flops(64, 24)
