"""The torch operations that stand in for SGLang's kernels, as pure functions: no server."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm.platform.host_sglang.grouping import BUCKET, group_requests
from glm.platform.host_sglang.sampling_ops import murmur_hash32, top_k_renorm, top_p_renorm
from glm.platform.host_sglang.speculative_ops import (
    assign_draft_cache_locs, assign_req_to_token_pool, build_chain, extend_cache_locations, fill_bonus_tokens,
    rejection_sample, verify_by_rejection, verify_greedy,
)

V, ROWS = 6, 60_000


def chi_square(tokens, probs):
    """Standardised: about N(0, 1) when ``tokens`` were drawn from ``probs``."""
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    expected = probs.double() * len(tokens)
    freedom = len(probs) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


def one_round(seed):
    """ROWS rounds of two drafts: the target's and the draft's distributions, and the tokens committed."""
    random = torch.Generator().manual_seed(seed)
    target = torch.rand(3, V, generator=random).softmax(-1) ** 3
    draft = torch.rand(2, V, generator=random).softmax(-1) ** 3
    target, draft = target / target.sum(-1, keepdim=True), draft / draft.sum(-1, keepdim=True)
    drafts = torch.stack([torch.multinomial(draft[i], ROWS, True, generator=random) for i in range(2)], 1)
    candidates = torch.cat([torch.zeros(ROWS, 1, dtype=torch.long), drafts], 1)
    accepted, final = rejection_sample(
        candidates, torch.rand(ROWS, 3, generator=random), torch.rand(ROWS, generator=random),
        target.expand(ROWS, 3, V), draft.expand(ROWS, 2, V),
    )
    committed = [torch.where(accepted > i, drafts[:, i], final) for i in range(2)] + [final]
    return target, draft, committed, accepted


@pytest.mark.parametrize("seed", range(3))
def test_committed_tokens_follow_the_target_at_every_position_reached(seed):
    target, draft, committed, accepted = one_round(seed)
    for position in range(3):
        reached = accepted >= position
        assert abs(chi_square(committed[position][reached], target[position])) < 4.5
    assert chi_square(committed[0], draft[0]) > 20  # the twin: the same tokens are not the draft's


def test_always_accepting_would_be_noticed():
    target, draft, committed, accepted = one_round(0)
    greedy_accept = torch.multinomial(draft[0], ROWS, True)
    assert chi_square(greedy_accept, target[0]) > 20


def test_acceptance_is_the_overlap_of_the_two_distributions():
    target, draft, _, accepted = one_round(1)
    overlap = torch.minimum(target[0], draft[0]).sum()
    assert abs((accepted >= 1).double().mean() - overlap) < 0.01


def test_equal_distributions_accept_everything_and_disjoint_ones_nothing():
    p = torch.tensor([0.5, 0.5, 0.0, 0.0])
    candidates, coins = torch.tensor([[3, 0, 1]]), torch.tensor([[0.999, 0.999, 0.999]])
    same = rejection_sample(candidates, coins, torch.tensor([0.1]), p.expand(1, 3, 4), p.expand(1, 2, 4))
    assert same[0].item() == 2
    disjoint = rejection_sample(torch.tensor([[3, 0, 1]]), coins * 0, torch.tensor([0.9]), p.flip(0).expand(1, 3, 4),
                                p.expand(1, 2, 4))
    assert disjoint[0].item() == 0 and disjoint[1].item() in (2, 3)


def outcome(batch, width):
    return torch.zeros(batch * width, dtype=torch.int32), torch.full((batch, width), -9, dtype=torch.int32), torch.empty(
        batch, dtype=torch.int32)


def test_the_commit_is_laid_out_as_sglang_reads_it():
    predicts, index, count = outcome(2, 3)
    candidates = torch.tensor([[9, 4, 5], [9, 6, 7]])
    target = torch.tensor([[4, 5, 8], [1, 7, 2]])  # the first keeps both drafts, the second none
    verify_greedy(predicts, index, count, candidates, None, None, None, target)
    assert count.tolist() == [2, 0]
    assert index.tolist() == [[0, 1, 2], [3, -1, -1]]
    assert [predicts[i].item() for i in (0, 1, 2, 3)] == [4, 5, 8, 1]


def test_rejection_writes_the_same_layout():
    predicts, index, count = outcome(1, 2)
    certain = torch.eye(4)[[2, 3]][None]
    verify_by_rejection(predicts, index, count, torch.tensor([[0, 2]]), None, None, None, torch.full((1, 2), 0.5),
                        torch.tensor([0.5]), certain, certain[:, :1], 1.0, 1.0, True)
    assert (count.item(), index.tolist(), predicts.tolist()) == (1, [[0, 1]], [2, 3])


def test_memory_slots_are_written_and_read_where_the_table_says():
    table = torch.zeros(4, 10, dtype=torch.int32)
    requests, start, end = torch.tensor([2, 0]), torch.tensor([3, 0]), torch.tensor([5, 3])
    assign_req_to_token_pool(requests, table, start, end, torch.tensor([11, 12, 21, 22, 23]), 2)
    assert table[2].tolist() == [0, 0, 0, 11, 12, 0, 0, 0, 0, 0] and table[0, :4].tolist() == [21, 22, 23, 0]
    read = extend_cache_locations(req_pool_indices=requests, req_to_token=table, start_offset=start, draft_token_num=2)
    assert read.tolist() == [11, 12, 21, 22]
    out, positions = torch.empty(4, dtype=torch.int64), torch.empty(2, dtype=torch.int64)
    assign_draft_cache_locs(requests, table, start, out, 1, 2, positions)
    assert out.tolist() == [11, 12, 21, 22] and positions.tolist() == [3, 0]


def test_the_chain_of_three_slots():
    positions = torch.empty(6, dtype=torch.int64)
    index, following, sibling = (torch.empty(2, 3, dtype=torch.int64) for _ in range(3))
    build_chain(None, None, torch.tensor([5, 8]), None, positions, index, following, sibling, 1, 2, 3, None)
    assert positions.tolist() == [5, 6, 7, 8, 9, 10] and index.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert following.tolist() == [[1, 2, -1]] * 2 and sibling.eq(-1).all()


def test_the_bonus_token_is_the_last_accepted():
    bonus = torch.empty(2, dtype=torch.int32)
    fill_bonus_tokens(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([3, 1]), bonus, 3, 2)
    assert bonus.tolist() == [3, 4]


def test_top_k_and_top_p_cut_what_they_should():
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    assert torch.allclose(top_k_renorm(probs, torch.tensor([2])), torch.tensor([[4 / 7, 3 / 7, 0, 0]]))
    assert torch.allclose(top_p_renorm(probs, torch.tensor([0.6])), torch.tensor([[4 / 7, 3 / 7, 0, 0]]))
    assert torch.allclose(top_p_renorm(probs, torch.tensor([1.0])), probs)


def murmur3(data: bytes) -> int:
    """MurmurHash3 x86 32, seed 0, from its definition in plain integers."""
    h, mask = 0, 0xFFFFFFFF
    for i in range(0, len(data), 4):
        k = int.from_bytes(data[i : i + 4], "little") * 0xCC9E2D51 & mask
        h ^= (k << 15 | k >> 17) * 0x1B873593 & mask
        h = ((h << 13 | h >> 19) & mask) * 5 + 0xE6546B64 & mask
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & mask
    h = (h ^ h >> 13) * 0xC2B2AE35 & mask
    return h ^ h >> 16


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_murmur_hash_is_the_published_function(seed, position, column):
    data = seed.to_bytes(8, "little") + position.to_bytes(4, "little") + column.to_bytes(4, "little")
    ours = murmur_hash32(torch.tensor([seed]), torch.tensor([position]), torch.tensor([column]))
    assert int(ours[0, 0]) == murmur3(data)


lengths = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=20)


@given(lengths, st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_request_is_in_one_group_that_holds_it(pairs, invariant):
    queries, keys = [q for q, _ in pairs], [q + before for q, before in pairs]
    groups = group_requests(queries, keys, invariant)
    assert sorted(i for _, _, members in groups for i in members) == list(range(len(pairs)))
    for num_queries, num_keys, members in groups:
        assert all(queries[i] <= num_queries and keys[i] <= num_keys for i in members)


@given(lengths)
@settings(max_examples=50, deadline=None)
def test_invariant_padding_depends_on_the_request_alone(pairs):
    queries, keys = [q for q, _ in pairs], [q + before for q, before in pairs]
    for num_queries, num_keys, members in group_requests(queries, keys, True):
        for i in members:
            assert (num_queries, num_keys) == group_requests([queries[i]], [keys[i]], True)[0][:2]
            assert num_keys % BUCKET == 0
