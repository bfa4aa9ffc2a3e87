from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from glm.data.mixture import Interleaving

shares = st.dictionaries(st.sampled_from("abcde"), st.floats(0.01, 1.0), min_size=1)


@given(shares, st.integers(0, 3000))
def test_shares_hold_over_any_prefix(shares, rows):
    total = sum(shares.values())
    counts = Counter(source for source, _ in Interleaving(shares).rows(0, rows))
    for source, share in shares.items():
        assert abs(counts[source] - rows * share / total) <= len(shares)


@given(shares, st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 20))
def test_rows_do_not_depend_on_where_reading_starts(shares, first, before, after):
    interleaving = Interleaving(shares)
    whole = interleaving.rows(first, before + after)
    assert whole == interleaving.rows(first, before) + interleaving.rows(first + before, after)


@given(shares, st.integers(1, 500))
def test_each_source_serves_its_rows_in_order_and_none_twice(shares, rows):
    interleaving = Interleaving(shares)
    numbers = {source: [] for source in shares}
    for source, number in interleaving.rows(0, rows):
        numbers[source].append(number)
    assert all(served == list(range(len(served))) for served in numbers.values())
    assert {source: len(served) for source, served in numbers.items()} == interleaving.counts(rows)


def test_a_row_far_into_a_stage_is_found_at_once():
    assert len(Interleaving({"a": 0.7, "b": 0.3}).rows(10**12, 3)) == 3
