"""Whether a stage fits its devices, and what the planner says when it does not."""

from pathlib import Path

from glm.model.size import parameters
from glm.plan.activations import Chunk
from glm.plan.memory import StageStates, apply, build_states, fits, least_ranks, room_bytes, stage_memory, suggest
from glm.recipe.compose import load_run
from tests.model_fixture import tiny_shape
from tests.plan.recipes import stage

CONFIGS = Path(__file__).parents[2] / "configs" / "glm45"
STATES = [StageStates(0, 1, (Chunk(1, 3, True, True, 1),), 10**6, 4 * 10**6, 4 * 10**6, 10**6, 4 * 10**6, 4 * 10**6, 0, 10**6)]


def test_without_a_device_size_nothing_is_judged():
    memory = stage_memory(stage(), STATES)
    assert fits(stage(), memory) is None and room_bytes(stage()) is None


def test_total_is_states_activations_and_work_and_decides_whether_a_stage_fits():
    (rank,) = stage_memory(stage(), STATES)
    assert rank.total == 12 * 10**6 + rank.activations + rank.working
    for spare in (0, -1):
        one = stage(device={"memory_bytes": rank.total + spare + 1000, "reserved_bytes": 1000})
        assert fits(one, stage_memory(one, STATES)) is (spare == 0)


def test_recompute_is_suggested_before_smaller_micro_batches_and_the_suggestion_fits():
    plain = stage(batch={"tokens": 4096, "micro_batch_size": 8}, sequence_length=512)
    totals = {kind: stage_memory(apply(plain, {"recompute": kind}), STATES)[0].total for kind in ("none", "selective", "full")}
    assert totals["full"] < totals["selective"] < totals["none"]
    for kind, room in (("selective", totals["none"] - 1), ("full", totals["selective"] - 1)):
        one = apply(plain, {"device.memory_bytes": room})
        found = suggest(one, STATES)
        assert found.change == {"recompute": kind} and found.total == totals[kind] <= room
    assert suggest(apply(plain, {"device.memory_bytes": totals["full"] - 1}), STATES).change["batch.micro_batch_size"] == 1


def test_another_layout_is_suggested_when_nothing_else_helps_and_it_fits():
    one = stage(tiny_shape(num_layers=8), launcher={"ranks_per_node": 4}, layout={"pp": 2, "pipeline_layers": [5, 3]}, batch={"tokens": 4096})
    (states,) = build_states([one])
    least = max(rank.total for rank in stage_memory(apply(one, {"recompute": "full"}), states))
    found = suggest(apply(one, {"device.memory_bytes": least - 1}), states)
    assert found is not None and any(key.startswith("layout.") for key in found.change)
    changed = apply(one, found.change)
    assert max(rank.total for rank in stage_memory(changed, *build_states([changed]))) == found.total < least


def test_a_model_that_no_division_fits_is_told_at_once_with_the_least_number_of_ranks():
    one = stage(device={"memory_bytes": 10**6}, precision={"params": "bf16"})
    states = 14 * parameters(one.model).total    # weights 2, gradient 4, momentum 4, master 4 bytes
    assert least_ranks(one) == -(-states // 10**6) > 1 and suggest(one, STATES) is None
    assert least_ranks(apply(one, {"optimizer.frozen": ["router"]})) == -(-states // 7 // 10**6), "what is frozen has weights only"
    assert least_ranks(stage()) is None and least_ranks(apply(one, {"device.reserved_bytes": 2 * 10**6})) is None


def test_nothing_is_suggested_where_nothing_helps():
    assert suggest(stage(device={"memory_bytes": 1000}), STATES) is None


def test_engines_beside_the_trainer_take_their_share_of_a_device():
    run = load_run(CONFIGS / "4b.yaml")
    rl, sft = run.stages["rl_reasoning"], run.stages["sft_cold_start"]
    assert room_bytes(sft) - room_bytes(rl) == round(rl.engine.memory_fraction * 141e9)
