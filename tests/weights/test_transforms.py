"""transform and inverse undo each other, for every row kind and shape."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from glm.weights import transforms
from tests.model_fixture import tiny_shape

SMALL = st.integers(1, 4)


@st.composite
def shapes(draw):
    groups = draw(SMALL)
    return tiny_shape(
        num_query_groups=groups, num_attention_heads=groups * draw(SMALL), head_dim=4 * draw(SMALL), hidden_size=draw(st.integers(1, 9)),
        expert_ffn_size=draw(SMALL), num_experts=draw(st.integers(2, 5)), rotary_percent=0.5,
    )


def megatron_tensor(kind: str, shape) -> torch.Tensor:
    """A tensor whose values are all different."""
    rows = (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.head_dim
    experts, inner, hidden = shape.num_experts, shape.expert_ffn_size, shape.hidden_size
    sizes = {
        "SAME": (hidden, 3), "QKV": (rows, hidden), "QKV bias": (rows,), "GATE_UP": (2 * inner, hidden),
        "EXPERTS_GATE_UP": (experts, 2 * inner, hidden), "EXPERTS_DOWN": (experts, hidden, inner),
    }[kind]
    return torch.arange(torch.Size(sizes).numel()).reshape(sizes)


KINDS = ("SAME", "QKV", "QKV bias", "GATE_UP", "EXPERTS_GATE_UP", "EXPERTS_DOWN")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(shape=shapes())
def test_a_transform_and_its_inverse_are_the_identity(kind, shape):
    transform = getattr(transforms, kind.split()[0])
    tensor = megatron_tensor(kind, shape)
    parts = transform.to_hf(tensor, shape)
    assert torch.equal(transform.to_megatron(parts, shape), tensor)
    again = transform.to_hf(transform.to_megatron(parts, shape), shape)
    assert all(torch.equal(a, b) for a, b in zip(again, parts, strict=True))
    assert sum(part.numel() for part in parts) == tensor.numel()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_order_of_the_parts_matters(kind):
    shape = tiny_shape(num_query_groups=2, num_attention_heads=2)  # as many query as key rows: a swap keeps the shape
    transform = getattr(transforms, kind.split()[0])
    tensor = megatron_tensor(kind, shape)
    first, second, *rest = transform.to_hf(tensor, shape)
    assert not torch.equal(transform.to_megatron([second, first, *rest], shape), tensor)


def test_a_query_group_holds_its_heads_then_key_then_value():
    shape = tiny_shape(num_query_groups=2, num_attention_heads=4, head_dim=4)
    blocks = ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]
    fused = torch.arange(len(blocks)).repeat_interleave(4)
    q, k, v = transforms.split_qkv(fused, shape)
    assert [[blocks[i] for i in part[::4]] for part in (q, k, v)] == [["q0", "q1", "q2", "q3"], ["k0", "k1"], ["v0", "v1"]]


def test_experts_come_one_after_the_other_gate_before_up():
    stacked = torch.tensor([[[10.0], [11.0]], [[20.0], [21.0]]])  # expert, [gate; up], H
    assert [part.item() for part in transforms.split_experts_gate_up(stacked, tiny_shape())] == [10, 11, 20, 21]
