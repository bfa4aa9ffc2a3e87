"""Every layout trains what one rank trains: losses, MTP losses, gradients and the weights of five steps, balancing on.

``make test`` runs two ranks along every axis; ``make test-all`` the whole matrix, from which docs/numerics.md has its table
(``pytest -m full tests/layout --write-matrix``).
"""

from functools import cache
from pathlib import Path

import pytest

from tests.layout.cases import FULL, HARMLESS, QUICK, ROWS_TRAPPED, TRAPPED, Case, by_ranks
from tests.layout.compare import ROOT, Difference, difference, run_ranks
from tests.layout.matrix import names_in, replace_table
from tests.layout.training import Trained, train
from tests.layout.traps import TRAPS

NUMERICS = ROOT / "docs/numerics.md"
CASES_A_PROCESS = 14
"""Every case makes its process groups anew, and not all threads of the former ones end."""
MARGIN = 5e-6
"""Between the last expert chosen and the first one not, over all tokens of the single-rank run: several times what layouts differ by."""


@cache
def expected(reference: Case) -> Trained:
    """One rank, in this process."""
    return train(reference)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return compared((*QUICK, *TRAPPED), tmp_path_factory)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return compared(FULL, tmp_path_factory)


def compared(cases, tmp_path_factory) -> dict[str, Difference]:
    found = {}
    for ranks, group in by_ranks(cases).items():
        for some in batched(group, CASES_A_PROCESS):
            out = tmp_path_factory.mktemp(f"ranks{ranks}")
            for case, trained in zip(some, run_ranks(some, out), strict=True):
                found[case.label] = difference(trained, expected(case.reference))
    return found


def batched(cases: list[Case], size: int) -> list[list[Case]]:
    return [cases[first:first + size] for first in range(0, len(cases), size)]


REFERENCES = sorted({case.reference for case in FULL}, key=lambda case: case.label)


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda case: case.label)
def test_the_data_has_no_near_ties_that_rounding_could_turn(reference):
    assert expected(reference).margin > MARGIN


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda case: case.label)
def test_one_rank_learns_and_balances(reference):
    trained = expected(reference)
    biases = [tensor for name, tensor in trained.weights.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 4 and all(bias.abs().max() > 0 for bias in biases)
    assert all(tensor.any() for name, tensor in trained.gradients.items() if ".experts." not in name)


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.label)
def test_two_ranks_train_what_one_trains(quick, case: Case):
    assert quick[case.label].too_large == []


@pytest.mark.parametrize("case", TRAPPED, ids=lambda case: case.trap)
def test_what_megatron_does_by_default_is_noticed(quick, case: Case):
    assert quick[case.label].too_large != []


@pytest.mark.parametrize("case", HARMLESS, ids=lambda case: case.trap)
def test_on_one_rank_the_same_default_changes_nothing(case: Case):
    with TRAPS[case.trap]():
        assert difference(train(case), expected(case.reference)).too_large == []


def test_the_balance_weight_of_two_rows_is_noticed_on_one_rank():
    with TRAPS[ROWS_TRAPPED.trap]():
        assert difference(train(ROWS_TRAPPED), expected(ROWS_TRAPPED.reference)).too_large != []


@pytest.mark.full
@pytest.mark.parametrize("case", FULL, ids=lambda case: case.label)
def test_the_whole_matrix(full, case: Case):
    assert full[case.label].too_large == []


def test_the_document_shows_this_matrix():
    assert names_in(NUMERICS.read_text(encoding="utf-8")) == [case.label for case in FULL]


@pytest.mark.full
def test_the_matrix_is_written_when_asked(full, request):
    if request.config.getoption("--write-matrix"):
        replace_table(Path(NUMERICS), FULL, full)
