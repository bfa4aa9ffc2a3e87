"""Counts as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm.recipe.units import format_count, parse_count


def test_suffixes_are_powers_of_a_thousand():
    assert [parse_count(text) for text in ("15T", "23.1T", "500B", "16M", "4K", "10_000", " 7 ")] == [
        15 * 10**12, 231 * 10**11, 5 * 10**11, 16 * 10**6, 4000, 10_000, 7]


@pytest.mark.parametrize("wrong", ["many", "1.5", "1.0005K", "", "T", True, None, 1.5, "nan", "infT"])
def test_what_is_no_whole_number_is_refused(wrong):
    with pytest.raises(ValueError, match="expected a count"):
        parse_count(wrong)


@given(st.integers(0, 10**15))
def test_formatting_is_exact(count):
    assert parse_count(format_count(count)) == count
