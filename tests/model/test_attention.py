"""Packed documents attend to themselves only, and give what each gives alone."""

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm import platform

platform.activate("host")
from glm.model import attention_logits  # noqa: E402  (imports megatron)
from glm.model.attention import SDPAttention  # noqa: E402
from glm.model.documents import Documents, context_places, lay_out  # noqa: E402
from glm.train.batch import packed_batch  # noqa: E402


CPU = torch.device("cpu")


def attention():
    return SDPAttention(None, 1, None, "self", softmax_scale=0.25, pg_collection=SimpleNamespace(cp=SimpleNamespace(size=lambda: 1, rank=lambda: 0)))


def inputs(tokens: int):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(tokens, 1, heads, 16, generator=generator) for heads in (4, 2, 2))


def pack(lengths: list[int]) -> Documents:
    ids = [torch.zeros(length, dtype=torch.int64) for length in lengths]
    return packed_batch(ids, ids, [torch.ones(length) for length in lengths], lengths, CPU).documents


LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS)
def test_groups_hold_every_token_once(lengths):
    segments, groups = lay_out(lengths, packed=True)
    tokens = torch.cat([group.tokens for group in groups])
    assert not segments and sorted(tokens.tolist()) == list(range(sum(lengths)))
    assert all(group.real.sum() * 2 >= group.real.numel() for group in groups)


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, cp=st.sampled_from([2, 3, 4]))
def test_context_parallel_ranks_hold_every_token_once_and_see_their_document_from_its_beginning(lengths, cp):
    lengths = [*lengths, -sum(lengths) % (2 * cp)]
    seen = []
    for rank in range(cp):
        places = context_places(sum(lengths), rank, cp)
        segments, groups = lay_out(lengths, packed=True, cp_rank=rank, cp_size=cp)
        calls = [(torch.arange(s.queries.start, s.queries.stop), torch.arange(s.keys.start, s.keys.stop)) for s in segments]
        calls += [(q[r], k[r]) for group in groups for q, k, r in zip(group.queries, group.keys, group.real)]
        assert len(segments) <= 2
        for queries, keys in calls:
            document = next(start for start, end in bounds(lengths) if start <= keys[0] < end)
            assert keys[0] == document and torch.equal(places[queries], keys[-len(queries):])
        seen += [int(place) for queries, _ in calls for place in places[queries]]
    assert sorted(seen) == list(range(sum(lengths)))


def bounds(lengths: list[int]) -> list[tuple[int, int]]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return list(zip([0, *ends], ends))


def test_a_pack_equals_its_documents_alone():
    lengths = [20, 7, 37, 1, 63, 7]
    query, key, value = inputs(sum(lengths))
    packed = attention()(query, key, value, packed_seq_params=pack(lengths))
    for start, end in bounds(lengths):
        alone = attention()(*(tensor[start:end] for tensor in (query, key, value)))
        assert torch.allclose(packed[start:end], alone, atol=1e-6)


def test_another_document_changes_nothing():
    lengths = [9, 30]
    query, key, value = inputs(39)
    before = attention()(query, key, value, packed_seq_params=pack(lengths))
    value = value.clone()
    value[:9] += 1.0
    after = attention()(query, key, value, packed_seq_params=pack(lengths))
    assert torch.equal(before[9:], after[9:])
    assert not torch.equal(before[:9], after[:9])


def watched(query, key, documents) -> float:
    one = attention()
    one.watch.on = True
    one(query, key, torch.zeros_like(key), packed_seq_params=documents)
    return one.watch.take().item()


def largest_by_hand(query, key, lengths) -> float:
    """Of 4 query heads the first two look at the first key head; scale 0.25, as ``attention`` says."""
    logits = torch.einsum("sbnd,rbnd->bnsr", query, key.repeat_interleave(2, dim=2)) * 0.25
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (document[:, None] == document[None, :]).tril()
    return logits.masked_fill(~seen, -torch.inf).max().item()


@settings(max_examples=20, deadline=None)
@given(lengths=LENGTHS, block=st.sampled_from([1, 500, 1 << 25]))
def test_the_largest_logit_is_that_of_the_whole_matrix_whatever_the_blocks(lengths, block):
    query, key, _ = inputs(sum(lengths))
    before, attention_logits.BLOCK = attention_logits.BLOCK, block
    try:
        if sum(lengths) <= attention_logits.SAMPLED_QUERIES:
            assert abs(watched(query, key, pack(lengths)) - largest_by_hand(query, key, lengths)) < 1e-5
            assert abs(watched(query, key, None) - largest_by_hand(query, key, [sum(lengths)])) < 1e-5
        else:
            assert watched(query, key, pack(lengths)) <= largest_by_hand(query, key, lengths) + 1e-5
    finally:
        attention_logits.BLOCK = before


def test_a_pair_that_attention_does_not_see_counts_in_no_largest_logit():
    """By far the largest product is that of the first token of one document with the last one of the other, 40,000."""
    for documents in (pack([4, 4]), pack([8])):
        query, key, _ = inputs(8)
        query[0], key[-1] = 100.0, 100.0
        assert watched(query, key, documents) < 1000


def test_of_a_long_row_the_last_query_is_looked_at():
    query, key, _ = inputs(1000)
    query[-1], key[17] = 100.0, 100.0
    assert watched(query, key, pack([1000])) == 0.25 * 100 * 100 * 16
