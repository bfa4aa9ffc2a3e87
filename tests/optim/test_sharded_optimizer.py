"""The optimizer under every layout does what it does on one rank, with its state kept once."""

from unittest import mock

import pytest
import torch

from glm import platform

platform.activate("host")
from megatron.core.dist_checkpointing import serialization  # noqa: E402

from glm.optim.newton_schulz import newton_schulz  # noqa: E402
from glm.weights import one_rank  # noqa: E402
from tests.optim.ranks import Ranks, divide  # noqa: E402
from tests.optim.sharded_model import SHAPE, WHOLE, optimizer_of, parameters, shard, sharded_model, train, whole  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TWO = [{"tp": 2}, {"tp": 2, "etp": 2}, {"tp": 2, "ep": 2}, {"pp": 2}, {"ep": 2}, {"cp": 2}, {"etp": 2}]
FOUR = [
    {"tp": 2, "pp": 2}, {"tp": 2}, {"tp": 2, "ep": 2}, {"tp": 2, "etp": 2}, {"tp": 2, "ep": 4}, {"pp": 2, "ep": 2}, {"cp": 2, "ep": 2},
    {"ep": 2, "etp": 2},
]


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


def trained(params: str = "fp32", steps: range = range(4)) -> dict:
    """What one rank holds after training, and what it kept of optimizer state."""
    named = parameters(whole("weight"), DTYPES[params])
    optimizer = optimizer_of(named)
    norms = train(optimizer, named, steps)
    return {
        "norms": norms,
        "weights": {name: parameter.detach() for name, parameter in named},
        "state_numbers": sum(tensor.numel() for _, _, tensor in optimizer._state()),
        "table": optimizer.table,
    }


def distances(expected: dict[str, torch.Tensor], params: str = "fp32") -> tuple[list[float], dict[str, float]]:
    """Norms, and for each parameter of this rank its largest difference from ``expected``, over the largest move."""
    result, start = trained(params), whole("weight")
    return result["norms"], {
        name: ((weight - shard(name, expected[name])).abs().max() / (expected[name] - start[name]).abs().max()).item()
        for name, weight in result["weights"].items()
    }


@pytest.fixture(scope="module")
def alone():
    """One rank, which has everything."""
    one_rank.start(SHAPE, platform="host")
    divide({})
    return {params: trained(params) for params in DTYPES}


def test_the_norm_is_that_of_all_gradients_once(alone):
    for step, norm in enumerate(alone["fp32"]["norms"]):
        grads = whole(f"gradient {step}", scale=0.1 if step % 2 else 0.01)
        assert norm == pytest.approx(sum(grad.double().square().sum() for grad in grads.values()).sqrt().item(), rel=1e-12)


def check(ranks, layout, alone):
    for norms, distance in ranks(layout, distances, alone["fp32"]["weights"]):
        assert norms == pytest.approx(alone["fp32"]["norms"], rel=1e-12)
        assert max(distance.values()) < 1e-6, distance


@pytest.mark.parametrize("layout", TWO, ids=str)
def test_two_ranks_update_like_one(two, alone, layout):
    check(two, layout, alone)


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR, ids=str)
def test_four_ranks_update_like_one(four, alone, layout):
    check(four, layout, alone)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"ep": 2}], ids=str)
def test_all_ranks_see_the_same_norm(two, layout):
    first, second = two(layout, trained)
    assert first["norms"] == second["norms"]


@pytest.mark.parametrize("params", DTYPES)
def test_data_parallel_ranks_update_bitwise_like_one_and_share_the_state(two, alone, params):
    replies = two({}, trained, params)
    for reply in replies:
        assert reply["norms"] == alone[params]["norms"]
        for name, weight in alone[params]["weights"].items():
            assert torch.equal(reply["weights"][name], weight), name
    held = [reply["state_numbers"] for reply in replies]
    assert sum(held) == alone[params]["state_numbers"]
    assert max(held) < 0.6 * sum(held)


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}, {"ep": 2}, {"tp": 2, "etp": 2}], ids=str)
def test_the_table_counts_every_parameter_of_the_whole_model_once(two, alone, layout):
    tables = {reply["table"] for reply in two(layout, trained, "fp32", range(0))}
    assert tables == {alone["fp32"]["table"]}
    assert f"{sum(torch.Size(shape).numel() for shape in WHOLE.values()):,}" in alone["fp32"]["table"]


def without_exchange(expected: dict[str, torch.Tensor]) -> tuple[list[float], dict[str, float]]:
    """Each rank takes its shards for whole matrices."""
    with mock.patch("glm.optim.muon.newton_schulz_shards", lambda shards, cut, steps: newton_schulz(shards, steps)):
        return distances(expected)


def test_shards_orthogonalised_alone_would_be_noticed(two, alone):
    for _, distance in two({"tp": 2}, without_exchange, alone["fp32"]["weights"]):
        assert distance["decoder.layers.0.self_attention.linear_proj.weight"] > 0.05
        assert distance["decoder.layers.1.mlp.experts.weight1"] < 1e-5, "not cut under tp alone"


def save(folder: str, params: str) -> None:
    """Trains three steps and writes weights and state."""
    named = parameters(whole("weight"), DTYPES[params])
    optimizer = optimizer_of(named)
    train(optimizer, named, range(3))
    model = sharded_model(named)
    serialization.save({"model": model, "optimizer": optimizer.sharded_state_dict(model)}, folder)


def resumed(folder: str, params: str) -> dict:
    """Loads what ``save`` wrote into a model that had other weights, and trains three steps more."""
    named = parameters(whole("other weight"), DTYPES[params])
    optimizer = optimizer_of(named)
    train(optimizer, named, range(7, 8))
    model = sharded_model(named)
    loaded = serialization.load({"model": model, "optimizer": optimizer.sharded_state_dict(model)}, folder)
    for name, parameter in named:
        parameter.data.copy_(loaded["model"][name])
    optimizer.load_state_dict(loaded["optimizer"])
    norms = train(optimizer, named, range(3, 6))
    return {"norms": norms, "weights": {name: parameter.detach() for name, parameter in named}}


def mismatches(folder: str, params: str, expected: dict) -> list[str]:
    result = resumed(folder, params)
    wrong = [name for name, weight in result["weights"].items() if not torch.equal(weight, shard(name, expected["weights"][name]))]
    return wrong + [f"norm {norm}" for norm, right in zip(result["norms"], expected["norms"]) if abs(norm / right - 1) > 1e-12]


@pytest.fixture(scope="module")
def uninterrupted(alone):
    divide({})
    whole_runs = {params: trained(params, range(6)) for params in DTYPES}
    return {params: run | {"norms": run["norms"][3:]} for params, run in whole_runs.items()}


@pytest.mark.parametrize("params", DTYPES)
def test_state_saved_by_two_copies_continues_bitwise_on_one_rank_and_back(two, uninterrupted, tmp_path, params):
    by_two, by_one = str(tmp_path / "two"), str(tmp_path / "one")
    for folder in (by_two, by_one):
        (tmp_path / folder).mkdir()
    two({}, save, by_two, params)
    divide({})
    assert mismatches(by_two, params, uninterrupted[params]) == []
    save(by_one, params)
    assert two({}, mismatches, by_one, params, uninterrupted[params]) == [[], []]


@pytest.mark.parametrize("layout", [{"tp": 2}, {"ep": 2}, {"pp": 2}], ids=str)
def test_state_goes_through_a_checkpoint_into_another_layout(two, uninterrupted, tmp_path, layout):
    two(layout, save, str(tmp_path), "fp32")
    divide({})
    assert mismatches(str(tmp_path), "fp32", uninterrupted["fp32"]) == []
    assert two({}, mismatches, str(tmp_path), "fp32", uninterrupted["fp32"]) == [[], []]
    assert two(layout, mismatches, str(tmp_path), "fp32", uninterrupted["fp32"]) == [[], []]
