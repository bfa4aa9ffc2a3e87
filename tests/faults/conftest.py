"""The run that nothing happens to."""

import pytest

from tests.faults.stage import TWO_RANKS, run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "undisturbed"
    run(folder, *TWO_RANKS)
    return folder
