"""The optimizer under every layout does what it does on one rank, with its state kept once."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from glm import platform

platform.activate("host")
import torch.distributed as dist  # noqa: E402

from glm.checkpoint import store  # noqa: E402
from glm.errors import NumericsError  # noqa: E402
from glm.model.size import parameters  # noqa: E402
from glm.optim.newton_schulz import newton_schulz  # noqa: E402
from glm.recipe.sections import AdamWAlone, Muon, Split  # noqa: E402
from glm.runtime import Runtime  # noqa: E402
from glm.weights import one_rank  # noqa: E402
from tests.optim.given_gradients import SHAPE, Case, gradient  # noqa: E402
from tests.optim.ranks import Ranks, divide  # noqa: E402

PARAMS = ("fp32", "bf16")
TWO = [{"tp": 2}, {"tp": 2, "etp": 2}, {"tp": 2, "ep": 2}, {"etp": 2}, {"ep": 2}, {"cp": 2}, {"pp": 2}, {"pp": 2, "vpp": 2}]
FOUR = [
    {}, {"tp": 2}, {"tp": 2, "ep": 2}, {"tp": 2, "etp": 2}, {"tp": 2, "ep": 4}, {"tp": 2, "pp": 2}, {"pp": 2, "ep": 2}, {"cp": 2, "ep": 2},
    {"ep": 2, "etp": 2},
]

CHOICES = {
    "per head": Muon(split=Split(qkv="per_head")), "fused": Muon(split=Split(qkv="fused", gate_up="fused")),
    "head and router": Muon(head="muon", router="muon"), "bf16": Muon(newton_schulz_dtype="bf16"), "adamw": AdamWAlone(name="adamw"),
}
"""What else the recipe can ask for; the default is in every other test."""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("two"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    ranks = Ranks(4, tmp_path_factory.mktemp("four"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def alone():
    """Four steps on one rank, which has everything."""
    one_rank.start(SHAPE, platform="host")
    divide({})
    return {params: trained({}, params) for params in PARAMS}


def trained(layout: dict, params: str = "fp32", steps: range = range(4), settings: Muon | AdamWAlone = Muon()) -> dict:
    case = Case(layout, params, settings=settings)
    start, norms = case.weights, case.train(steps)
    moved = {name: (weight - start[name]).float().abs().max().item() for name, weight in case.weights.items()}
    return {"norms": norms, "weights": case.weights, "moved": moved, "state": case.state_numbers, "table": case.optimizer.table}


def differences(layout: dict, expected: dict, settings: Muon | AdamWAlone = Muon()) -> tuple[list[float], dict[str, float]]:
    """Norms, and for each parameter of this rank its largest difference from ``expected``, as a part of the largest move."""
    case = Case(layout, settings=settings)
    norms = case.train(range(4))
    return norms, {
        name: ((weight - case.own(name, expected["weights"][name])).abs().max() / expected["moved"][name]).item()
        for name, weight in case.weights.items()
    }


def test_the_norm_is_that_of_all_gradients_once(alone):
    for step, norm in enumerate(alone["fp32"]["norms"]):
        squares = [gradient(name, weight.shape, step).double().square().sum() for name, weight in alone["fp32"]["weights"].items()]
        assert norm == pytest.approx(sum(squares).sqrt().item(), rel=1e-12)
    assert min(alone["fp32"]["norms"]) < 1 < max(alone["fp32"]["norms"]), "clipped steps and others"


def check(ranks, layout, alone: dict, settings: Muon | AdamWAlone = Muon(), tolerance: float = 1e-6):
    """``alone``: what ``trained`` gave on one rank."""
    replies = ranks(layout, differences, layout, alone, settings)
    assert len({tuple(norms) for norms, _ in replies}) == 1, "ranks would decide differently"
    seen = set()
    for norms, difference in replies:
        assert norms == pytest.approx(alone["norms"], rel=1e-12)
        assert max(difference.values()) < tolerance, difference
        seen |= difference.keys()
    assert seen == alone["weights"].keys()


@pytest.mark.parametrize("layout", TWO, ids=str)
def test_two_ranks_update_like_one(two, alone, layout):
    check(two, layout, alone["fp32"])


@pytest.mark.full
@pytest.mark.parametrize("layout", FOUR, ids=str)
def test_four_ranks_update_like_one(four, alone, layout):
    check(four, layout, alone["fp32"])


@pytest.mark.parametrize("choice", CHOICES)
def test_shards_update_like_the_whole_whatever_is_orthogonalised(two, alone, choice):
    divide({})
    whole = trained({}, settings=CHOICES[choice])
    moved = [name for name, weight in whole["weights"].items() if not torch.allclose(weight, alone["fp32"]["weights"][name], atol=1e-4)]
    assert moved, "the choice changes something"
    layout = {"tp": 2, "etp": 2}
    check(two, layout, whole, CHOICES[choice], tolerance=1e-5 if choice == "fused" else 1e-6)    # gate and up in another order of rows
    for reply in two({}, trained, {}, "fp32", range(4), CHOICES[choice]):
        assert all(torch.equal(reply["weights"][name], weight) for name, weight in whole["weights"].items()), "data parallel: bit for bit"


def without_exchange(layout: dict, expected: dict) -> tuple[list[float], dict[str, float]]:
    """Each rank takes its shards for whole matrices."""
    with mock.patch("glm.optim.muon.newton_schulz_shards", lambda shards, cut, polynomials: newton_schulz(shards, polynomials)):
        return differences(layout, expected)


def test_shards_orthogonalised_alone_would_be_noticed(two, alone):
    layout = {"tp": 2, "etp": 1}
    for _, difference in two(layout, without_exchange, layout, alone["fp32"]):
        assert difference["decoder.layers.0.self_attention.linear_proj.weight"] > 0.05
        assert difference["decoder.layers.1.mlp.experts.weight1"] < 1e-6, "not cut under tp alone"


def stopped(layout: dict, broken: str) -> tuple[str, bool]:
    """The error of a step in which ``broken`` has a NaN in its gradient, and whether the weights are as before."""
    case = Case(layout)
    case.train(range(1))
    before = case.weights
    for name, parameter in case.named:
        if name == broken:
            parameter.main_grad.view(-1)[-1] = float("nan")
    with pytest.raises(NumericsError) as error:
        case.optimizer.step(1e-2)
    return str(error.value), all(torch.equal(before[name], weight) for name, weight in case.weights.items())


@pytest.mark.parametrize("layout, broken", [
    ({"pp": 2}, "output_layer.weight"), ({"ep": 2}, "decoder.layers.2.mlp.experts.weight2"), ({"tp": 2}, "decoder.final_layernorm.weight"),
], ids=str)
def test_a_gradient_that_is_not_a_number_stops_all_ranks_before_anything_moves(two, layout, broken):
    for message, unchanged in two(layout, stopped, layout, broken):
        assert "gradient of this step" in message and "nan" in message
        assert unchanged


@pytest.mark.parametrize("params", PARAMS)
def test_data_parallel_ranks_update_bitwise_like_one_and_share_the_state(two, alone, params):
    replies = two({}, trained, {}, params)
    for reply in replies:
        assert reply["norms"] == alone[params]["norms"]
        for name, weight in alone[params]["weights"].items():
            assert torch.equal(reply["weights"][name], weight), name
    held = [reply["state"] for reply in replies]
    assert sum(held) == alone[params]["state"]
    assert max(held) < 0.55 * sum(held)


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}, {"ep": 2}, {"tp": 2, "etp": 2}], ids=str)
def test_the_table_counts_every_parameter_of_the_whole_model_once(two, alone, layout):
    tables = {reply["table"] for reply in two(layout, trained, layout, "fp32", range(0))}
    assert tables == {alone["fp32"]["table"]}
    assert f"{parameters(SHAPE).total:,}" in alone["fp32"]["table"]


def save(layout: dict, folder: Path, params: str, settings: Muon | AdamWAlone = Muon()) -> None:
    """Trains three steps and writes weights and state."""
    case = Case(layout, params, settings=settings)
    case.train(range(3))
    info = store.CheckpointInfo(stage="test", step=3, stage_tokens=0, run_tokens=0, rotary_base=10_000)
    store.save(folder, info, SHAPE, case.chunks, case.optimizer, Runtime(dist.get_rank(), dist.get_world_size(), 0, 1), keep=1)


def mismatches(layout: dict, folder: Path, params: str, expected: dict, settings: Muon | AdamWAlone = Muon()) -> list[str]:
    """Loads what ``save`` wrote over another model, trains three steps more; what is not bit for bit as ``expected``."""
    case = Case(layout, params, seed=1, settings=settings)
    case.train(range(7, 8))
    store.load(store.newest_checkpoint(folder), case.chunks, case.optimizer)
    norms = case.train(range(3, 6))
    wrong = [name for name, weight in case.weights.items() if not torch.equal(weight, case.own(name, expected["weights"][name]))]
    return wrong + [f"norm {norm}" for norm, right in zip(norms, expected["norms"][3:]) if abs(norm / right - 1) > 1e-12]


@pytest.fixture(scope="module")
def uninterrupted(alone):
    """Six steps on one rank."""
    divide({})
    return {params: trained({}, params, range(6)) for params in PARAMS}


@pytest.mark.parametrize("params", PARAMS)
def test_state_saved_by_two_copies_continues_bitwise_on_one_rank_and_back(two, uninterrupted, tmp_path, params):
    two({}, save, {}, tmp_path / "two", params)
    divide({})
    assert mismatches({}, tmp_path / "two", params, uninterrupted[params]) == []
    save({}, tmp_path / "one", params)
    assert two({}, mismatches, {}, tmp_path / "one", params, uninterrupted[params]) == [[], []]


@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 2, "etp": 2}, {"ep": 2}, {"pp": 2, "vpp": 2}], ids=str)
def test_state_goes_through_a_checkpoint_into_another_layout(two, uninterrupted, tmp_path, layout):
    two(layout, save, layout, tmp_path, "fp32")
    divide({})
    assert mismatches({}, tmp_path, "fp32", uninterrupted["fp32"]) == []
    for other in ({}, layout):
        assert two(other, mismatches, other, tmp_path, "fp32", uninterrupted["fp32"]) == [[], []]


@pytest.mark.parametrize("choice", ["head and router", "adamw"])
def test_state_of_other_rules_goes_through_a_checkpoint_into_another_layout(two, tmp_path, choice):
    settings, layout = CHOICES[choice], {"tp": 2}
    divide({})
    whole = trained({}, "fp32", range(6), settings)
    two(layout, save, layout, tmp_path, "fp32", settings)
    divide({})
    assert mismatches({}, tmp_path, "fp32", whole, settings) == []
    assert two({}, mismatches, {}, tmp_path, "fp32", whole, settings) == [[], []]


@pytest.mark.full
@pytest.mark.parametrize("layout", [{"tp": 2}, {"etp": 2, "ep": 1}, {"tp": 2, "ep": 2}], ids=str)
def test_shards_with_copies_save_the_state_of_each_owner(four, uninterrupted, tmp_path, layout):
    four(layout, save, layout, tmp_path, "fp32")
    divide({})
    assert mismatches({}, tmp_path, "fp32", uninterrupted["fp32"]) == []
    assert four(layout, mismatches, layout, tmp_path, "fp32", uninterrupted["fp32"]) == [[]] * 4
