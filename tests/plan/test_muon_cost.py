"""What Muon costs of a training step, by counting."""

from pathlib import Path

import pytest

from glm.check import muon_share
from glm.model.size import training_flops_per_token
from glm.optim.flops import step_flops
from glm.plan.memory import build_states
from glm.recipe.compose import load_run
from glm.recipe.sections import AdamWAlone, Muon, Split

CONFIGS = Path(__file__).parents[2] / "configs" / "glm45"


@pytest.mark.parametrize("settings", [
    Muon(), Muon(split=Split(qkv="per_head")), Muon(split=Split(qkv="fused", gate_up="fused")), Muon(head="muon", router="muon", newton_schulz_steps=3),
], ids=["default", "per head", "fused", "head and router"])
def test_the_count_is_the_sum_over_the_matrices_of_the_model(settings):
    from glm import platform

    platform.activate("host")
    from glm.model.chunks import named_parameters
    from glm.optim.build import fused_of, with_rules
    from glm.optim.muon import muon_flops
    from glm.optim.param_groups import param_groups
    from glm.weights import one_rank
    from tests.optim.given_gradients import SHAPE, Case

    one_rank.start(SHAPE, platform="host")
    case, fused = Case({}), fused_of(settings, SHAPE)
    found = sum(
        muon_flops(name, parameter, None, fused, settings.newton_schulz_steps)
        for name, parameter, rule in with_rules(param_groups(named_parameters(case.chunks), settings)) if rule == "muon"
    )
    assert step_flops(SHAPE, settings) == found > 0
    assert step_flops(SHAPE, AdamWAlone(name="adamw")) == 0


@pytest.fixture(scope="module")
def shares() -> dict[str, tuple]:
    """(recipe, what ``muon_share`` says) of the first stage of each run file; their models are built in one process."""
    recipes = [load_run(CONFIGS / f"{name}.yaml").stages["pretrain_general"] for name in ("355b", "air", "30m")]
    return {recipe.name: (recipe, muon_share(recipe, states)) for recipe, states in zip(recipes, build_states(recipes))}


@pytest.mark.parametrize("name, flops", [("355b", 1.36e16), ("air", 3.87e15)])
def test_muon_is_far_below_4_percent_of_a_step_at_the_papers_batch(shares, name, flops):
    """16M to 64M tokens, over the whole model and on the busiest rank of our layouts."""
    recipe, share = shares[name]
    assert share["flops"] == pytest.approx(flops, rel=0.01)
    first, last = share["batch_tokens"]
    assert 15e6 < first < 17e6 and 63e6 < last < 65e6
    trained = training_flops_per_token(recipe.model, recipe.sequence_length) * first
    assert share["share"][0] == pytest.approx(share["flops"] / (share["flops"] + trained)) and share["share"][0] < 0.005
    assert share["share"][1] < share["share"][0] <= share["busiest_share"][0] < 0.04


def test_one_rank_does_all_the_work(shares):
    _, share = shares["30m"]
    assert share["busiest_rank_flops"] == share["flops"] and share["busiest_share"] == share["share"]
    assert share["share"][0] > 0.3, "small batches are another matter"
