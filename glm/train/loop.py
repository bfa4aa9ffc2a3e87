"""The loop of pre-training, mid-training and supervised fine-tuning."""

import time

import torch.distributed as dist

from glm import runtime as runtimes
from glm.checkpoint.run_folder import RunFolder
from glm.data.batches import Batches
from glm.data.prepare import prepare
from glm.data.read_ahead import ReadAhead
from glm.metrics import goodput
from glm.metrics.log import MetricLog
from glm.platform.ranks import place
from glm.recipe.compose import dump_recipe
from glm.recipe.mixture import mixture_of
from glm.recipe.schema import TrainRecipe
from glm.runtime import Runtime
from glm.train.batch import MicroBatch, micro_batches
from glm.train.losses import LossByPart
from glm.train.metrics import StepMetrics, validation_metrics
from glm.train.plan import count_steps, plan_step, whole_micro_batches
from glm.train.resume import Replay, StageCheckpoints
from glm.train.separation import check_documents_apart
from glm.train.setbacks import Setbacks
from glm.train.step import Trainer
from glm.train.stop import StopRequest
from glm.train.watchdog import Watchdog


def train(recipe: TrainRecipe) -> None:
    """Runs the stage from where its newest checkpoint stands to its end."""
    folder, rank = RunFolder.of(recipe), place().rank
    with Watchdog(recipe.launcher.timeout_seconds, rank, folder.hang(recipe.stage, rank)) as watchdog:
        _train(recipe, folder, watchdog)


def _train(recipe: TrainRecipe, folder: RunFolder, watchdog: Watchdog) -> None:
    runtime = runtimes.start(recipe)
    watchdog.beat("the preparation of the data", limited=runtime.world_size > 1)    # alone it keeps nobody waiting
    if runtime.is_first:
        prepare(recipe, folder)
    dist.barrier()
    watchdog.beat("the building of the model")
    batches = ReadAhead(recipe, folder, runtime.rank, stride=runtime.dp_size)
    trainer = Trainer(recipe)
    setbacks = Setbacks(recipe, folder, runtime)
    checkpoints = StageCheckpoints(
        recipe, folder, runtime, trainer, held_out_loss=lambda rows: validate(trainer, recipe, batches, runtime, rows)["loss"],
        guard_history=lambda: setbacks.history.to_json(),
    )
    watchdog.beat("the return to the newest checkpoint")
    resumed = checkpoints.restore()
    progress = resumed.progress
    setbacks.resume(progress, checkpoints.finish)
    watchdog.beat("the start of the loop")
    total = count_steps(recipe)
    if recipe.data.packing == "best_fit":
        shown = check_documents_apart(trainer)
        if runtime.is_first:
            print(shown, flush=True)
    if runtime.is_first and progress.step == 0 and (recipe.parent is None or recipe.schedule.clock == "stage"):
        print(trainer.optimizer.table, flush=True)

    with (
        MetricLog(
            folder.root, recipe.stage, total_steps=total, enabled=runtime.is_first, logging=recipe.logging, config=dump_recipe(recipe),
        ) as log,
        StopRequest(recipe.stage, folder, runtime) as stop,
    ):
        dropped = log.rewind(progress.step if progress.step else -1)
        replay = Replay(recipe, setbacks.of_this_path(dropped), resumed.exact)
        if runtime.is_first:
            goodput.note_start(folder, recipe.stage, progress.step, dropped)
        loss, step_metrics, phases = loss_of(recipe), StepMetrics(recipe), trainer.phases
        while progress.stage_tokens < recipe.tokens:
            started = time.perf_counter()
            watchdog.beat(f"step {progress.step + 1}")
            plan = plan_step(recipe, progress)
            with phases("data"):
                rows = setbacks.rows(batches, *share(progress.stage_tokens // recipe.sequence_length, plan.num_sequences, runtime))
                passes = forward_passes(rows, trainer, recipe)
            progress = progress.after(plan)
            outcome = trainer.step(
                passes, loss, lr=plan.lr, mtp_weight=plan.mtp_weight, bias_update_rate=plan.bias_update_rate,
                refusal=setbacks.refusal, detailed=recipe.logging.is_detailed(progress.step),
            )
            seconds = time.perf_counter() - started
            with phases("logging"):
                metrics = step_metrics(plan, progress, outcome, seconds, phases.so_far()) | setbacks.after(plan, outcome, batches)
                if runtime.is_first:
                    metrics |= setbacks.consumed(batches, progress)
                if log.line(progress.step, metrics):
                    phases.clear()
            replay.compare(progress.step, metrics)
            if recipe.validation.every_steps and progress.step % recipe.validation.every_steps == 0 and progress.step < total:
                with phases("validation"):
                    log.line(progress.step, validation_metrics(validate(trainer, recipe, batches, runtime, recipe.validation.rows)))
            with phases("checkpoint"):
                checkpoints.after_step(progress)
            stop.obey(progress, save=checkpoints.close)
        watchdog.beat("the end of the stage")
        checkpoints.close(progress)
        log.line(progress.step, validation_metrics(validate(trainer, recipe, batches, runtime, recipe.validation.rows)))
        if runtime.is_first and (told := goodput.of_stage(folder, recipe.stage)):
            log.line(progress.step, told.metrics)
            print(f"{recipe.stage}: {told.sentence}", flush=True)
    runtimes.stop()


def share(first: int, count: int, runtime: Runtime) -> tuple[int, int]:
    """(first, count) of the rows of a step that this data-parallel rank trains on: the plan made them divide."""
    assert count % runtime.dp_size == 0, (count, runtime.dp_size)
    mine = count // runtime.dp_size
    return first + runtime.dp_rank * mine, mine


def loss_of(recipe: TrainRecipe) -> LossByPart:
    return LossByPart(sources_of(recipe), recipe.sequence_length)


def sources_of(recipe: TrainRecipe) -> list[str]:
    """Sources of the mixture, in one order."""
    return sorted(mixture_of(recipe.data).sources)


def validate(trainer: Trainer, recipe: TrainRecipe, batches: Batches, runtime: Runtime, least: int) -> dict[str, float]:
    """Mean loss a token on ``least`` held-out rows, or as many more as whole micro-batches take; also of sources and positions."""
    unit = whole_micro_batches(recipe)
    rows = batches.validation_rows(-(-least // unit) * unit)
    mine = rows[runtime.dp_rank::runtime.dp_size]
    return trainer.evaluate(forward_passes(mine, trainer, recipe), loss_of(recipe))


def forward_passes(rows, trainer: Trainer, recipe: TrainRecipe) -> list[MicroBatch]:
    packed = recipe.data.packing == "best_fit"
    return micro_batches(
        rows, recipe.batch.micro_batch_size, packed, trainer.device, multiple_of=trainer.row_multiple, sources=sources_of(recipe),
    )
