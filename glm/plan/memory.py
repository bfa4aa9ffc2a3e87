"""Does a training stage fit its devices: memory of each pipeline stage's ranks, and what to change when it does not.

States (parameters, gradients, optimizer) are those of the model itself, built on the meta device by a child process
(glm.plan.ranks), so that this one imports no torch; activations and working memory are formulas (glm.plan.activations).
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from glm.errors import UserError
from glm.model.size import parameters
from glm.plan.activations import Chunk, activations
from glm.recipe.check import check_stage, refuse_unproved
from glm.recipe.saved import dump_recipe
from glm.recipe.schema import ModelStageRecipe, RLRecipe, TrainRecipe
from glm.train.plan import Progress, data_parallel_size, plan_step


@dataclass(frozen=True)
class StageStates:
    """What every rank of one pipeline stage holds all the time."""

    pipeline_rank: int
    ranks: int
    """Of this stage."""
    chunks: tuple[Chunk, ...]
    parameters: int
    """Numbers, in the model chunks of one rank."""
    parameter_bytes: int
    """Router biases and counts, which are buffers, included."""
    gradient_bytes: int
    """The fp32 buffers of megatron's DDP, for parameters that are trained."""
    largest_gradient_bytes: int
    """Of one parameter in its own precision: backward makes it, then it is added to the buffer."""
    optimizer_bytes: int
    """On the rank of this stage that keeps most: whole parameters are divided over data-parallel ranks."""
    least_optimizer_bytes: int
    muon_flops: int
    """Of orthogonalisation, a step, on the rank of this stage that has most."""
    step_bytes: int
    """Working memory of the optimizer, an upper bound: the directions of the largest bucket, their batch and the results, and of what
    Newton-Schulz works on at once (the bucket; on a CPU what its cache holds) three copies and three Gram matrices no larger,
    all fp32; shards of matrices are gathered and given back, four more."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the fullest rank of one pipeline stage at its fullest moment."""

    states: StageStates
    activations: int
    working: int
    """Beyond activations: a layer at work in the backward pass, or the optimizer's step if that needs more."""

    @property
    def total(self) -> int:
        states = self.states
        return states.parameter_bytes + states.gradient_bytes + states.optimizer_bytes + self.activations + self.working


def stage_memory(recipe: ModelStageRecipe, states: Sequence[StageStates]) -> list[RankMemory]:
    """Memory of each pipeline stage of ``recipe``, whose states are given."""
    ends = (0, recipe.tokens) if isinstance(recipe, TrainRecipe) else (0,)    # a ramp is monotonic
    rows = max(plan_step(recipe, Progress(stage_tokens=tokens)).num_sequences for tokens in ends)
    micro_batches = -(-rows // (data_parallel_size(recipe) * recipe.batch.micro_batch_size))
    found = []
    for stage in states:
        kept = activations(recipe, stage.chunks, stage.pipeline_rank, micro_batches)
        backward = kept.working + stage.largest_gradient_bytes
        found.append(RankMemory(stage, kept.kept, max(backward, stage.step_bytes - kept.kept)))
    return found


def build_states(recipes: Sequence[ModelStageRecipe]) -> list[list[StageStates]]:
    """The pipeline stages of each recipe, built in a process of their own. Recipes that divide one model alike are built once."""
    if not recipes:
        return []
    keys = [_what_matters(recipe) for recipe in recipes]
    distinct = {key: recipe for key, recipe in zip(keys, recipes)}
    request = json.dumps([dump_recipe(recipe) for recipe in distinct.values()])
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "glm.plan.ranks"], input=request, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"glm.plan.ranks ended with code {done.returncode}\n{done.stderr}")
    answers = dict(zip(distinct, json.loads(done.stdout)))
    return [[_stage(values) for values in answers[key]] for key in keys]


def fits(recipe: ModelStageRecipe, memory: Sequence[RankMemory]) -> bool | None:
    """None when the hardware file does not say how much a device has."""
    room = room_bytes(recipe)
    return None if room is None else all(rank.total <= room for rank in memory)


def room_bytes(recipe: ModelStageRecipe) -> int | None:
    """What the trainer's tensors may take of a device; engines started beside it on one machine have their share already."""
    device = recipe.device
    if device.memory_bytes is None:
        return None
    shared = isinstance(recipe, RLRecipe) and recipe.launcher.kind == "local"
    return device.memory_bytes - device.reserved_bytes - (round(recipe.engine.memory_fraction * device.memory_bytes) if shared else 0)


def least_ranks(recipe: ModelStageRecipe) -> int | None:
    """Devices that hold parameters, gradients and optimizer state once, however they are divided: with fewer, nothing fits."""
    room = room_bytes(recipe)
    if room is None or room <= 0:
        return None
    trained = 4 + 4 + (4 if recipe.precision.params == "bf16" else 0)    # gradient and momentum in fp32, a master copy of what is not
    each = (2 if recipe.precision.params == "bf16" else 4) + (0 if recipe.optimizer.frozen else trained)
    return -(-parameters(recipe.model).total * each // room)


@dataclass(frozen=True)
class Suggestion:
    """A change of a few keys with which a stage fits."""

    change: dict[str, object]
    """Dotted key: value."""
    total: int
    """Bytes on the fullest rank then."""


def suggest(recipe: ModelStageRecipe, states: Sequence[StageStates]) -> Suggestion | None:
    """The least change with which ``recipe`` fits; None if no neighbour does.

    First what costs only time on the same layout, then layouts near this one, from the one that changes least.
    """
    least = least_ranks(recipe)
    if least is None or least > recipe.world_size:
        return None
    local = list(_local_changes(recipe))
    runs = _allowed(recipe, to_run=True)    # what would not be run as it is need not be run when changed
    layouts = [change for change in _layout_changes(recipe) if _allowed(apply(recipe, change), to_run=runs)]
    if found := _first_that_fits(recipe, local, [states] * len(local)):
        return found
    built = build_states([apply(recipe, layout) for layout in layouts])
    pairs = [(layout | change, its) for layout, its in zip(layouts, built) for change in ({}, *local)]
    return _first_that_fits(recipe, [change for change, _ in pairs], [its for _, its in pairs])


def _first_that_fits(recipe: ModelStageRecipe, changes: list[dict], states: list[Sequence[StageStates]]) -> Suggestion | None:
    for change, its in zip(changes, states):
        changed = apply(recipe, change)
        memory = stage_memory(changed, its)
        if fits(changed, memory):
            return Suggestion(change, max(rank.total for rank in memory))
    return None


def apply(recipe: ModelStageRecipe, change: dict[str, object]) -> ModelStageRecipe:
    """``recipe`` with dotted keys replaced, checked by its types anew."""
    values = dump_recipe(recipe)
    for key, value in change.items():
        *path, last = key.split(".")
        section = values
        for word in path:
            section = section[word]
        section[last] = value
    return type(recipe).model_validate(values)


def _local_changes(recipe: ModelStageRecipe):
    """Recompute more, then smaller micro-batches too."""
    kinds = ("none", "selective", "full")
    more = kinds[kinds.index(recipe.recompute) + 1:]
    yield from ({"recompute": kind} for kind in more)
    if recipe.batch.micro_batch_size > 1:
        yield {"batch.micro_batch_size": 1}
        yield from ({"batch.micro_batch_size": 1, "recompute": kind} for kind in more)


def _layout_changes(recipe: ModelStageRecipe):
    """Twice or four times as many parts along one axis, then along two."""
    layout = recipe.layout
    axes = ("ep", "pp", "cp", "tp") if recipe.sequence_length > 4096 * layout.cp else ("ep", "pp", "tp")
    steps = [{axis: factor} for factor in (2, 4) for axis in axes]
    steps += [{first: 2, second: 2} for index, first in enumerate(axes) for second in axes[index + 1:]]
    for step in steps:
        change = {f"layout.{axis}": factor * getattr(layout, axis) for axis, factor in step.items()}
        if "pp" in step and layout.pipeline_layers is not None:
            change["layout.pipeline_layers"] = None
        yield change


def _allowed(recipe: ModelStageRecipe, *, to_run: bool) -> bool:
    try:
        check_stage(recipe, {})
        if to_run:
            refuse_unproved(recipe)
    except UserError:
        return False
    return True


def _what_matters(recipe: ModelStageRecipe) -> str:
    """Equal for recipes whose ranks hold the same states."""
    values = dump_recipe(recipe)
    return json.dumps([values[key] for key in ("model", "layout", "precision", "optimizer", "megatron")] + [recipe.world_size], sort_keys=True)


def _stage(values: dict) -> StageStates:
    return StageStates(**values | {"chunks": tuple(Chunk(**chunk) for chunk in values["chunks"])})
