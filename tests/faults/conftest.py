"""Runs that nothing happens to."""

import pytest

from tests.faults.stage import TWO_RANKS, copy_of, run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "undisturbed"
    run(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed_pair(undisturbed):
    """The same on two ranks."""
    folder = copy_of(undisturbed, "undisturbed_pair", up_to=0)
    run(folder, *TWO_RANKS)
    return folder
