"""Own forward and backward passes against torch's: the same values and gradients, wherever the gradient is added."""

import pytest
import torch
import torch.nn.functional as F

from glm import platform

platform.activate("host")
from glm.model import head  # noqa: E402  (imports megatron)
from glm.model.experts import _Experts  # noqa: E402
from glm.model.gated import SwiGLU  # noqa: E402
from glm.model.gradients import weight_gradient  # noqa: E402
from glm.model.linear import _Linear  # noqa: E402
from glm.model.norm import RMSNorm  # noqa: E402

E, H, INNER = 4, 16, 12


class Numbers:
    """Random leaves, the same on every run."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype=torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype).requires_grad_()


def gradients(output: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of a sum in which every element of ``output`` has a weight of its own; those of ``main_grad`` where it was added there."""
    for leaf in leaves:
        leaf.grad = None
        if hasattr(leaf, "main_grad"):
            leaf.main_grad.zero_()
    weights = torch.linspace(0.5, 1.5, output.numel()).view(output.shape).to(output.dtype)
    (output * weights).sum().backward()
    return [leaf.main_grad if leaf.grad is None else leaf.grad for leaf in leaves]


def require_close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 2e-6) -> None:
    assert len(found) == len(expected)
    for mine, other in zip(found, expected):
        scale = other.abs().max().clamp(min=1e-3)
        assert ((mine - other).abs().max() / scale).item() <= tolerance


def plain_experts(hidden, weight1, weight2, probs, counts) -> torch.Tensor:
    rows = []
    for one, first, second, prob in zip(hidden.split(counts), weight1, weight2, probs.split(counts)):
        gate, up = F.linear(one, first).chunk(2, dim=-1)
        rows.append(F.linear(F.silu(gate) * up * prob[:, None], second))
    return torch.cat(rows)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [0, 0, 0, 0]])
def test_experts_equal_a_loop_over_experts(counts, in_place):
    numbers = Numbers()
    leaves = [numbers(sum(counts), H), numbers(E, 2 * INNER, H), numbers(E, H, INNER), numbers(sum(counts))]
    expected_output = plain_experts(*leaves, counts)
    expected = gradients(expected_output, leaves)
    if in_place:
        for weight in leaves[1:3]:
            weight.main_grad = torch.zeros_like(weight)
    output = _Experts.apply(*leaves, torch.tensor(counts), in_place)
    assert torch.allclose(output, expected_output, atol=1e-5)
    found = gradients(output, leaves)
    require_close([gradient for gradient in found if gradient.numel()], [gradient for gradient in expected if gradient.numel()])
    assert (leaves[1].grad is None) == in_place, "the gradient is in one place only"


def test_a_routing_weight_that_is_off_changes_the_experts_gradient():
    numbers, counts = Numbers(), [3, 0, 5, 1]
    leaves = [numbers(9, H), numbers(E, 2 * INNER, H), numbers(E, H, INNER), numbers(9)]
    expected = gradients(plain_experts(*leaves, counts), leaves)
    with torch.no_grad():
        leaves[3][2] *= 1.001
    with pytest.raises(AssertionError):
        require_close(gradients(_Experts.apply(*leaves, torch.tensor(counts), False), leaves), expected)


def test_gradients_add_up_in_the_buffer():
    numbers = Numbers()
    weight, inputs = numbers(8, H), [numbers(5, H), numbers(3, H)]
    for one in inputs:
        F.linear(one, weight).sum().backward()
    expected, weight.grad = weight.grad, None
    weight.main_grad = torch.zeros_like(weight)
    for one in inputs:
        _Linear.apply(one, weight, None).sum().backward()
    assert weight.grad is None
    require_close([weight.main_grad], [expected])


def test_a_bf16_gradient_is_not_added_to_a_buffer_of_another_type():
    weight = Numbers()(8, H, dtype=torch.bfloat16)
    weight.main_grad = torch.zeros(8, H)
    gradient = weight_gradient(weight, torch.ones(8, 3, dtype=torch.bfloat16), torch.ones(3, H, dtype=torch.bfloat16))
    assert gradient.dtype == torch.bfloat16 and (gradient == 3).all() and not weight.main_grad.any()


def test_a_linear_layer_equals_torchs():
    numbers = Numbers()
    leaves = [numbers(7, H), numbers(8, H), numbers(8)]
    require_close(gradients(_Linear.apply(*leaves), leaves), gradients(F.linear(*leaves), leaves))


def test_the_gated_activation_equals_the_formula():
    both = Numbers()(3, 5, 2 * INNER)
    gate, up = both.chunk(2, dim=-1)
    module = SwiGLU(config=None)
    assert torch.allclose(module(both), F.silu(gate) * up, atol=1e-6)
    require_close(gradients(module(both), [both]), gradients(F.silu(gate) * up, [both]))


@pytest.mark.parametrize("shape", [(3, 5, H), (2, 3, 4, 8)])
def test_rms_norm_equals_torchs(shape):
    numbers = Numbers()
    norm = RMSNorm(type("Config", (), {"params_dtype": torch.float32, "sequence_parallel": False}), shape[-1], eps=1e-3)
    hidden = numbers(*shape)
    with torch.no_grad():
        norm.weight.copy_(numbers(shape[-1]))
    expected = F.rms_norm(hidden, norm.weight.shape, norm.weight, 1e-3)
    assert torch.allclose(norm(hidden), expected, atol=1e-5)
    require_close(gradients(norm(hidden), [hidden, norm.weight]), gradients(expected, [hidden, norm.weight]))


@pytest.mark.parametrize("chunk", [1 << 25, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_heads_losses_are_cross_entropy(temperature, chunk, monkeypatch):
    monkeypatch.setattr(head, "CHUNK", chunk)
    numbers, V = Numbers(), 37
    hidden, weight = numbers(2, 6, H), numbers(V, H)
    labels = torch.randint(V, (2, 6), generator=numbers.generator)
    expected = F.cross_entropy((hidden @ weight.t() / temperature).flatten(0, 1), labels.flatten(), reduction="none").view(2, 6)
    found = head.token_losses(hidden, weight, labels, temperature)
    assert torch.allclose(found, expected, atol=1e-5)
    require_close(gradients(found, [hidden, weight]), gradients(expected, [hidden, weight]))
    with torch.no_grad():
        assert torch.equal(head.token_losses(hidden, weight, labels, temperature), found)


def test_losses_of_a_bf16_head_are_summed_in_float32():
    numbers, V = Numbers(), 512
    hidden, weight = numbers(6, H, dtype=torch.bfloat16), numbers(V, H, dtype=torch.bfloat16)
    labels = torch.arange(6)
    expected = F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="none")
    found = head.token_losses(hidden, weight, labels)
    assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-5)
    require_close(gradients(found, [hidden, weight]), gradients(expected, [hidden, weight]), tolerance=2e-2)
