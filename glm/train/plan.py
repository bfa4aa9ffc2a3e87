"""What one training step does, as a pure function of the recipe and of the tokens seen. Imports no torch.

Two clocks: run tokens (over all pre- and mid-training stages) drive the batch ramp and, where ``schedule.clock`` says
``run``, the learning rate; stage tokens start at zero in every stage. Nothing here has state, so a resumed run plans the
same steps as one that never stopped.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from glm.errors import RecipeError
from glm.recipe.check import data_parallel_size
from glm.recipe.schema import ModelStageRecipe, RLRecipe, StageRecipe, TrainRecipe
from glm.recipe.sections import Schedule
from glm.recipe.units import format_count

__all__ = [
    "Progress", "StepPlan", "count_steps", "data_parallel_size", "lr_at", "plan_step", "progress_at", "schedule_table", "stage_at",
    "stage_steps", "total_tokens", "whole_micro_batches",
]


@dataclass(frozen=True)
class Progress:
    """Where a stage is. ``stage_tokens`` counts sequence_length tokens a sequence, padding included."""

    step: int = 0
    stage_tokens: int = 0

    def after(self, plan: "StepPlan") -> "Progress":
        return Progress(self.step + 1, self.stage_tokens + plan.tokens)


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step over all ranks."""

    step: int
    run_tokens: int
    """Run tokens before the step."""
    stage_tokens: int
    """Stage tokens before the step."""
    num_sequences: int
    """Over all ranks; a multiple of the data-parallel size."""
    tokens: int
    """num_sequences x sequence_length."""
    sequence_length: int
    lr: float
    """Muon's learning rate; AdamW's is this times ``optimizer.adamw.lr_ratio``."""
    mtp_weight: float
    bias_update_rate: float
    rotary_base: int


def plan_step(recipe: ModelStageRecipe, progress: Progress) -> StepPlan:
    """The step that follows ``progress``.

    The batch is rounded to whole sequences, to the same number on every rank and, once it holds a micro-batch for each
    rank, to whole micro-batches. It is never empty and not shortened at the end of a stage: the last step may pass the
    stage's tokens by less than one batch. The learning rate is that of the end of the step: the first one is above 0, the
    last one of the schedule is ``final_lr``.
    """
    run_tokens = recipe.run_tokens_before + progress.stage_tokens
    sequences = _num_sequences(recipe, run_tokens)
    tokens = sequences * recipe.sequence_length
    start = run_tokens if recipe.schedule.clock == "run" else progress.stage_tokens
    return StepPlan(
        step=progress.step,
        run_tokens=run_tokens,
        stage_tokens=progress.stage_tokens,
        num_sequences=sequences,
        tokens=tokens,
        sequence_length=recipe.sequence_length,
        lr=lr_at(recipe.schedule, start + tokens, _stage_end(recipe)),
        mtp_weight=recipe.losses.mtp_weight,
        bias_update_rate=recipe.router.bias_update_rate,
        rotary_base=recipe.rotary_base,
    )


def lr_at(schedule: Schedule, tokens: int, stage_end: int) -> float:
    """Learning rate at a point of the schedule's clock: linear from 0 over ``warmup``, then the shape down to ``final_lr``.

    ``stage_end``: where the decay ends if the schedule does not say, on the same clock.
    """
    if tokens < schedule.warmup:
        return schedule.peak_lr * tokens / schedule.warmup
    if schedule.shape == "constant":
        return schedule.peak_lr
    end = stage_end if schedule.decay_until is None else schedule.decay_until
    done = min(1.0, (tokens - schedule.warmup) / max(1, end - schedule.warmup))
    left = 1.0 - done if schedule.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return schedule.final_lr + (schedule.peak_lr - schedule.final_lr) * left


def stage_at(stages: Mapping[str, StageRecipe], tokens: int) -> tuple[str, int]:
    """The stage a point of the run's clock lies in, and the tokens of that stage before it: what plan_step asks for.

    A stage edge belongs to the stage that begins there, the end of the last stage to the last. Stages with a clock of their
    own have no place on the run's; if all of ``stages`` have, there must be one, and ``tokens`` counts from its beginning.
    Raises RecipeError with the range if ``tokens`` lies outside.
    """
    trained = {name: recipe for name, recipe in stages.items() if isinstance(recipe, ModelStageRecipe)}
    clocked = {name: recipe.run_tokens_before for name, recipe in trained.items() if recipe.schedule.clock == "run"}
    if not clocked and len(trained) == 1:
        clocked = {name: 0 for name in trained}
    for name, before in clocked.items():
        if before <= tokens < before + total_tokens(trained[name]):
            return name, tokens - before
    ends = {before + total_tokens(trained[name]): name for name, before in clocked.items()}
    if tokens in ends:
        return ends[tokens], tokens - clocked[ends[tokens]]
    if not clocked:
        raise RecipeError(
            f"--at {format_count(tokens)}", f"{', '.join(trained) or 'no stage that trains'}", "stages on the run's clock, or one stage with its own",
            "name one stage: glm show RUNFILE STAGE --schedule --at TOKENS",
        )
    raise RecipeError(
        f"--at {format_count(tokens)}", f"{format_count(tokens)} tokens",
        f"what the stages cover: {_ranges([(before, before + total_tokens(trained[name])) for name, before in clocked.items()])}",
        "choose a point in this range",
    )


def _ranges(parts: list[tuple[int, int]]) -> str:
    """``0 to 23.1T``; parts that touch are one."""
    joined: list[list[int]] = []
    for start, end in sorted(parts):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(end, joined[-1][1])
        else:
            joined.append([start, end])
    return ", ".join(f"{format_count(start)} to {format_count(end)}" for start, end in joined)


def stage_steps(recipe: ModelStageRecipe) -> Iterator[StepPlan]:
    """Every step of a stage from its beginning, in order."""
    progress = Progress()
    while not _is_over(recipe, progress):
        plan = plan_step(recipe, progress)
        yield plan
        progress = progress.after(plan)


def count_steps(recipe: ModelStageRecipe) -> int:
    """How many steps the stage takes."""
    return recipe.rl.steps if isinstance(recipe, RLRecipe) else progress_at(recipe, recipe.tokens).step


def progress_at(recipe: ModelStageRecipe, stage_tokens: int) -> Progress:
    """The first boundary between steps at or after ``stage_tokens``: exact, and quick because equal steps are counted together."""
    step, seen, ramp_end = 0, 0, _ramp_end(recipe)
    while seen < stage_tokens:
        run_tokens = recipe.run_tokens_before + seen
        tokens = _num_sequences(recipe, run_tokens) * recipe.sequence_length
        equal = math.ceil((stage_tokens - seen) / tokens) if run_tokens >= ramp_end else 1
        step, seen = step + equal, seen + equal * tokens
    return Progress(step, seen)


def schedule_table(recipe: ModelStageRecipe, rows: int = 8) -> list[StepPlan]:
    """Up to ``rows`` steps spread evenly over the tokens of a stage, the first and the last included."""
    total = total_tokens(recipe)
    last = plan_step(recipe, Progress(0, max(0, total - 1))).tokens
    points = [max(0, total - last) * row // max(1, rows - 1) for row in range(rows)]
    return [plan_step(recipe, progress) for progress in dict.fromkeys(progress_at(recipe, point) for point in points)]


def _num_sequences(recipe: ModelStageRecipe, run_tokens: int) -> int:
    wanted = recipe.batch.tokens_at(run_tokens) / recipe.sequence_length
    whole = whole_micro_batches(recipe)
    unit = whole if wanted >= whole or recipe.layout.vpp > 1 else data_parallel_size(recipe)
    return max(1, round(wanted / unit)) * unit


def whole_micro_batches(recipe: ModelStageRecipe) -> int:
    """Sequences of the smallest step in which every rank has whole micro-batches; interleaved stages take pp of them in turn."""
    layout = recipe.layout
    return data_parallel_size(recipe) * recipe.batch.micro_batch_size * (layout.pp if layout.vpp > 1 else 1)


def total_tokens(recipe: ModelStageRecipe) -> int:
    """Tokens of the whole stage; those of RL count every reply at full length."""
    if isinstance(recipe, TrainRecipe):
        return recipe.tokens
    return recipe.rl.steps * _num_sequences(recipe, recipe.run_tokens_before) * recipe.sequence_length


def _stage_end(recipe: ModelStageRecipe) -> int:
    """The end of the stage on the schedule's clock."""
    return total_tokens(recipe) + (recipe.run_tokens_before if recipe.schedule.clock == "run" else 0)


def _is_over(recipe: ModelStageRecipe, progress: Progress) -> bool:
    if isinstance(recipe, RLRecipe):
        return progress.step >= recipe.rl.steps
    return progress.stage_tokens >= recipe.tokens


def _ramp_end(recipe: ModelStageRecipe) -> int:
    """Run tokens from which on all steps have the same size."""
    return 0 if isinstance(recipe.batch.tokens, int) else recipe.batch.tokens.over
