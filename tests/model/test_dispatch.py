"""Tokens go to their experts and back without communication as through megatron's dispatcher."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm import platform

platform.activate("host")
from megatron.core.transformer.moe.moe_layer import MoELayer  # noqa: E402
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection  # noqa: E402
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher  # noqa: E402

from glm.model.dispatch import LocalDispatcher  # noqa: E402
from tests.model_fixture import megatron_model, random_hf_weights, tiny_shape  # noqa: E402

SHAPE = tiny_shape(num_experts=6, experts_per_token=3)


def outcome(layer, hidden):
    """Output, and the gradients of the tokens and of the layer's parameters."""
    hidden = hidden.clone().requires_grad_()
    output, _ = layer(hidden)
    leaves = [hidden, *layer.parameters()]
    return [output, *torch.autograd.grad(output.square().sum(), leaves)]


@pytest.fixture(scope="module")
def layers():
    """(the layer as built, another with the same weights and upstream's dispatcher)."""
    local, upstream = (
        next(module for module in megatron_model(SHAPE, random_hf_weights(SHAPE)).modules() if isinstance(module, MoELayer))
        for _ in range(2)
    )
    assert isinstance(local.token_dispatcher, LocalDispatcher)
    experts = upstream.experts.num_local_experts
    upstream.token_dispatcher = MoEAlltoAllTokenDispatcher(
        experts, list(range(experts)), config=upstream.config, pg_collection=get_default_pg_collection(),
    )
    return local, upstream


def test_output_and_gradients_are_those_of_upstreams_dispatcher(layers):
    local, upstream = layers
    hidden = torch.randn(10, 2, SHAPE.hidden_size, generator=torch.Generator().manual_seed(0))
    for mine, other in zip(outcome(local, hidden), outcome(upstream, hidden), strict=True):
        assert ((mine - other).norm() / other.norm()).item() < 1e-6


def test_the_comparison_tells_another_routing(layers):
    local, upstream = layers
    hidden = torch.randn(10, 2, SHAPE.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = outcome(upstream, hidden)
    local.router.expert_bias[0] += 10
    try:
        found = outcome(local, hidden)
    finally:
        local.router.expert_bias[0] -= 10
    assert ((found[0] - expected[0]).norm() / expected[0].norm()).item() > 1e-3


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 20), experts=st.integers(1, 7), seed=st.integers(0, 1000), data=st.data())
def test_every_pair_is_sorted_by_expert_and_comes_back_to_its_token(tokens, experts, seed, data):
    chosen = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(seed)
    routing = torch.zeros(tokens, experts, dtype=torch.bool)
    routing.scatter_(1, torch.rand(tokens, experts, generator=generator).topk(chosen).indices, True)
    probs = torch.rand(tokens, experts, generator=generator) * routing
    rows = torch.arange(tokens, dtype=torch.float32)[:, None] + 1
    dispatcher = LocalDispatcher(SimpleNamespace(moe_router_topk=chosen))
    spread, weights = dispatcher.dispatch_preprocess(rows, routing, probs)
    pairs = [(expert, token) for expert in range(experts) for token in range(tokens) if routing[token, expert]]
    assert spread[:, 0].tolist() == [token + 1 for _, token in pairs]
    assert torch.equal(weights, torch.stack([probs[token, expert] for expert, token in pairs]))
    _, counts, _ = dispatcher.dispatch_postprocess(spread, weights)
    assert counts.tolist() == routing.sum(0).tolist()
    assert torch.equal(dispatcher.combine_postprocess(spread), rows * chosen)
