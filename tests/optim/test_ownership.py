"""Who keeps the optimizer state of what."""

from hypothesis import given, settings
from hypothesis import strategies as st

from glm.optim.ownership import Cost, owners

COSTS = st.lists(st.builds(Cost, flops=st.integers(0, 10**12), bytes=st.integers(1, 10**9)), max_size=40)


def loads(costs: list[Cost], ranks: int, key: str) -> list[int]:
    owner = owners(costs, ranks)
    return [sum(getattr(cost, key) for cost, own in zip(costs, owner) if own == rank) for rank in range(ranks)]


@settings(deadline=None)
@given(COSTS, st.integers(1, 9))
def test_every_parameter_has_one_owner_and_no_rank_is_ahead_by_more_than_its_last_matrix(costs, ranks):
    owner = owners(costs, ranks)
    assert len(owner) == len(costs) and all(0 <= rank < ranks for rank in owner)
    work = loads(costs, ranks, "flops")
    for rank in range(ranks):
        smallest = min((cost.flops for cost, own in zip(costs, owner) if own == rank and cost.flops), default=0)
        assert work[rank] - smallest <= min(work)


def test_layers_of_a_pipeline_stage_are_balanced():
    """Six layers of 355B on one of 16 stages: 10 experts each (EP 16) over 4 expert-data-parallel ranks."""
    layer = [Cost(flops=2 * 10**12, bytes=10 * 3072 * 5120 * 8), Cost(flops=10**12, bytes=10 * 1536 * 5120 * 8)]
    work, held = (loads(layer * 6, 4, key) for key in ("flops", "bytes"))
    assert max(work) <= 1.12 * sum(work) / 4 and max(held) <= 1.12 * sum(held) / 4


def test_what_needs_no_orthogonalisation_evens_out_the_bytes():
    costs = [Cost(5, 100), Cost(4, 10), *[Cost(0, 30)] * 3]
    assert owners(costs, 2) == [0, 1, 1, 1, 1]


def test_the_owner_does_not_depend_on_anything_but_the_costs():
    costs = [Cost(3, 3)] * 4 + [Cost(0, 8)] * 4
    assert owners(costs, 4) == owners(list(costs), 4) == [0, 1, 2, 3, 0, 1, 2, 3]
