"""Schedules as functions of the tokens seen, at full size and at tiny size."""

import time
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm.errors import RecipeError
from glm.recipe.compose import load_run
from glm.recipe.schema import ModelStageRecipe, TrainRecipe
from glm.recipe.sections import Schedule
from glm.train.plan import (
    Progress, count_steps, data_parallel_size, lr_at, plan_step, progress_at, schedule_table, stage_at, stage_steps, whole_micro_batches,
)

CONFIGS = Path(__file__).parents[2] / "configs" / "glm45"
TINY = load_run(CONFIGS / "tiny.yaml").stages
LARGE = load_run(CONFIGS / "355b.yaml").stages
TRAINED = [stage for stage, recipe in LARGE.items() if isinstance(recipe, ModelStageRecipe)]
CLOCKED = [stage for stage in TRAINED if LARGE[stage].schedule.clock == "run"]
T = 10**12


def at(stages, tokens: int):
    """The step that begins at a point of the run."""
    stage, inside = stage_at(stages, tokens)
    return plan_step(stages[stage], Progress(stage_tokens=inside))


def test_the_batch_rises_from_16M_to_64M_over_500B_and_stays():
    recipe = LARGE["pretrain_general"]
    at = [plan_step(recipe, Progress(0, tokens)).tokens for tokens in (0, 250 * 10**9, 500 * 10**9, 10 * T)]
    rank = data_parallel_size(recipe) * 4096
    for tokens, wanted in zip(at, (16e6, 40e6, 64e6, 64e6)):
        assert tokens % rank == 0 and abs(tokens - wanted) <= rank / 2
    assert [plan_step(LARGE[stage], Progress()).sequence_length for stage in ("pretrain_general", "midtrain_repo_code", "midtrain_long_context")] == [
        4096, 32768, 131072]


def test_the_learning_rate_is_one_cosine_over_all_23_1T_tokens():
    plan = plan_step(LARGE["pretrain_general"], Progress())
    assert plan.lr == pytest.approx(2.5e-4 * plan.tokens / 2e9) and plan.lr > 0
    assert plan_step(LARGE["pretrain_general"], Progress(9, 2 * 10**9)).lr == pytest.approx(2.5e-4, rel=1e-4)
    middle = (23.1e12 + 2e9) / 2
    assert lr_at(LARGE["pretrain_general"].schedule, int(middle), 0) == pytest.approx((2.5e-4 + 2.5e-5) / 2)
    last = schedule_table(LARGE["midtrain_long_context"])[-1]
    assert last.lr == pytest.approx(2.5e-5) and last.run_tokens + last.tokens >= 23.1 * T


@pytest.mark.parametrize("before, after", list(zip(TRAINED[:4], TRAINED[1:5])))
def test_nothing_jumps_between_stages_that_share_the_run_clock(before, after):
    end, start = schedule_table(LARGE[before])[-1], plan_step(LARGE[after], Progress())
    assert start.lr == pytest.approx(end.lr, rel=1e-4) and start.lr <= end.lr
    assert start.run_tokens == LARGE[before].run_tokens_before + LARGE[before].tokens


def test_mtp_weight_and_bias_rate_fall_after_the_first_15T():
    plans = {stage: plan_step(LARGE[stage], Progress()) for stage in TRAINED[:5]}
    assert [plan.mtp_weight for plan in plans.values()] == [0.3, 0.1, 0.1, 0.1, 0.1]
    assert [plan.bias_update_rate for plan in plans.values()] == [1e-3, 0, 0, 0, 0]
    assert [plan.rotary_base for plan in plans.values()] == [10_000, 10_000, 10**6, 10**6, 10**6]


@pytest.mark.parametrize("stage", TRAINED)
def test_the_steps_of_a_tiny_stage_cover_its_tokens_and_are_counted_right(stage):
    recipe = TINY[stage]
    plans = list(stage_steps(recipe))
    assert len(plans) == count_steps(recipe) and plans[0].stage_tokens == 0
    assert all(later.stage_tokens == plan.stage_tokens + plan.tokens for plan, later in zip(plans, plans[1:]))
    if isinstance(recipe, TrainRecipe):
        seen = plans[-1].stage_tokens + plans[-1].tokens
        assert recipe.tokens <= seen < recipe.tokens + plans[-1].tokens
    ranks = data_parallel_size(recipe)
    for plan in plans:
        assert plan.lr > 0 and plan.num_sequences >= ranks and plan.num_sequences % ranks == 0
        each = plan.num_sequences // ranks
        assert each < recipe.batch.micro_batch_size or each % recipe.batch.micro_batch_size == 0
    assert set(schedule_table(recipe)) <= set(plans) and {plans[0], plans[-1]} <= set(schedule_table(recipe, 8))


def test_the_tiny_run_ends_at_the_final_learning_rate_of_its_cosine():
    assert list(stage_steps(TINY["midtrain_long_context"]))[-1].lr == TINY["pretrain_general"].schedule.final_lr


def test_rl_takes_its_number_of_steps_and_the_replies_of_one_rollout():
    plans = list(stage_steps(TINY["rl_reasoning"]))
    recipe = TINY["rl_reasoning"]
    assert len(plans) == recipe.rl.steps
    assert {plan.num_sequences for plan in plans} == {recipe.rollout.prompts_per_step * recipe.rollout.group_size}
    assert {plan.lr for plan in plans} == {recipe.schedule.peak_lr}, "the schedule of RL is constant"


def test_a_table_of_the_large_run_and_its_number_of_steps_take_no_time():
    started = time.process_time()    # not of the wall clock: the machine may be busy
    steps = sum(count_steps(LARGE[stage]) for stage in TRAINED[:5])
    tables = [schedule_table(LARGE[stage]) for stage in TRAINED]
    assert 360_000 < steps < 375_000 and all(2 <= len(table) <= 8 for table in tables)
    assert time.process_time() - started < 3


@settings(deadline=None)
@given(st.integers(0, 921_600))
def test_walking_to_any_point_of_the_ramp_gives_the_boundary_the_steps_have(tokens):
    recipe, progress = TINY["pretrain_general"], Progress()
    while progress.stage_tokens < tokens:
        progress = progress.after(plan_step(recipe, progress))
    assert progress_at(recipe, tokens) == progress


@settings(deadline=None)
@given(st.sampled_from(["cosine", "linear", "constant"]), st.integers(0, 1000), st.integers(1001, 10_000), st.integers(1, 20_000))
def test_a_learning_rate_is_positive_bounded_and_falls_after_warmup(shape, warmup, end, tokens):
    schedule = Schedule(shape=shape, peak_lr=1.0, final_lr=0.1, warmup=warmup, decay_until=end)
    lr, later = lr_at(schedule, tokens, 0), lr_at(schedule, tokens + 50, 0)
    assert 0 < lr <= 1
    if tokens >= warmup:
        assert later <= lr and lr >= 0.1
    if tokens >= end:
        assert lr == (1.0 if shape == "constant" else pytest.approx(0.1))


def test_without_decay_until_the_decay_ends_with_the_stage_on_either_clock():
    for clock in ("run", "stage"):
        overrides = [f"sft_cold_start.schedule.clock={clock}", "sft_cold_start.schedule.warmup=0"]
        plans = list(stage_steps(load_run(CONFIGS / "tiny.yaml", overrides).stages["sft_cold_start"]))
        schedule = TINY["sft_cold_start"].schedule
        assert plans[-1].lr == pytest.approx(schedule.final_lr)
        assert (plans[0].lr > 0.9 * schedule.peak_lr) == (clock == "stage")


@settings(deadline=None)
@given(st.integers(0, 231 * 10**11 - 10**9), st.integers(0, 10**9))
def test_nothing_but_the_stated_edges_jumps_anywhere_in_23_1T_tokens(tokens, apart):
    before, after = at(LARGE, tokens), at(LARGE, tokens + apart)
    steepest = 2.5e-4 / 2e9                                           # warm-up; the cosine is a thousand times flatter
    assert abs(after.lr - before.lr) <= steepest * (after.run_tokens + after.tokens - before.run_tokens - before.tokens) * (1 + 1e-9) + 1e-18
    unit = max(whole_micro_batches(LARGE[stage]) * LARGE[stage].sequence_length for stage in CLOCKED)
    assert abs(after.tokens - before.tokens) <= 48e6 * apart / 500e9 + unit
    if stage_at(LARGE, tokens)[0] == stage_at(LARGE, tokens + apart)[0]:
        assert before.tokens <= after.tokens
        for name in ("mtp_weight", "bias_update_rate", "rotary_base", "sequence_length"):
            assert getattr(before, name) == getattr(after, name)
    assert (before.mtp_weight, before.bias_update_rate) == ((0.3, 1e-3) if tokens < 15 * T else (0.1, 0))
    assert (before.rotary_base, before.sequence_length) == (
        (10_000, 4096) if tokens < 22 * T else (10**6, 32_768 if tokens < 23 * T else 131_072))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(CLOCKED), st.lists(st.integers(0, 768_000), max_size=3))
def test_a_run_plans_the_same_steps_wherever_and_however_often_it_stopped(stage, stops):
    recipe = TINY[stage]
    straight, broken = list(stage_steps(recipe)), []
    progress = Progress()
    for stop in [*sorted(stops), recipe.tokens]:
        progress = Progress(**asdict(progress))    # what a checkpoint holds: two integers
        while progress.stage_tokens < min(stop, recipe.tokens):
            broken.append(plan_step(recipe, progress))
            progress = progress.after(broken[-1])
    assert broken == straight


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(20, 4000), min_size=5, max_size=5), st.integers(0, 10**9))
def test_run_tokens_add_up_over_stage_edges_whatever_the_stages_hold(thousands, anywhere):
    overrides = [f"{stage}.tokens={count * 1000}" for stage, count in zip(CLOCKED, thousands)]
    stages = load_run(CONFIGS / "tiny.yaml", overrides).stages
    edge = 0
    for stage, count in zip(CLOCKED, thousands):
        assert stages[stage].run_tokens_before == edge and stage_at(stages, edge) == (stage, 0)
        assert stage_at(stages, edge + count * 1000 - 1) == (stage, count * 1000 - 1)
        last = schedule_table(stages[stage], 2)[-1]
        assert last.run_tokens < edge + count * 1000 <= last.run_tokens + last.tokens
        edge += count * 1000
    assert stage_at(stages, edge) == (CLOCKED[-1], stages[CLOCKED[-1]].tokens), "the end of all is the last stage's"
    with pytest.raises(RecipeError, match="0 to "):
        stage_at(stages, edge + 1 + anywhere)
