"""Packed documents attend to themselves only, and give what each gives alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm import platform

platform.activate("host")
from glm.model.attention import SDPAttention, document_groups, pack_params  # noqa: E402  (imports megatron)
from glm.model.experts import _grouped_product, _looped_product  # noqa: E402


def attention():
    return SDPAttention(None, 1, None, "self", softmax_scale=0.25)


def inputs(tokens: int):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(tokens, heads, 16, generator=generator) for heads in (4, 2, 2))


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=12))
def test_groups_hold_every_token_once(lengths):
    groups = document_groups(lengths)
    tokens = torch.cat([group.tokens for group in groups])
    assert sorted(tokens.tolist()) == list(range(sum(lengths)))
    assert all(group.real.sum() * 2 >= group.real.numel() for group in groups)


def test_a_pack_equals_its_documents_alone():
    lengths = [20, 7, 37, 1, 63, 7]
    query, key, value = inputs(sum(lengths))
    packed = attention()(query, key, value, packed_seq_params=pack_params(lengths, torch.device("cpu")))
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = attention()(*(tensor[part].unsqueeze(1) for tensor in (query, key, value)))
        assert torch.allclose(packed[part], alone.squeeze(1), atol=1e-6)
        start += length


def test_another_document_changes_nothing():
    lengths = [9, 30]
    query, key, value = inputs(39)
    pack = pack_params(lengths, torch.device("cpu"))
    before = attention()(query, key, value, packed_seq_params=pack)
    value = value.clone()
    value[:9] += 1.0
    after = attention()(query, key, value, packed_seq_params=pack)
    assert torch.equal(before[9:], after[9:])
    assert not torch.equal(before[:9], after[:9])


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [0, 0, 0, 0]])
def test_one_grouped_product_equals_a_loop_over_experts(counts):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(sum(counts), 16, generator=generator)
    weight = torch.randn(4, 24, 16, generator=generator)
    per_expert = torch.tensor(counts)
    assert torch.allclose(_grouped_product(tokens, weight, per_expert), _looped_product(tokens, weight, per_expert), atol=1e-5)
