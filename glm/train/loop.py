"""The loop of pre-training, mid-training and supervised fine-tuning."""

import time

import torch.distributed as dist

from glm import runtime as runtimes
from glm.checkpoint import store
from glm.checkpoint.run_folder import RunFolder
from glm.data.batches import Batches
from glm.data.prepare import prepare
from glm.errors import CheckpointError
from glm.metrics.log import MetricLog
from glm.recipe.compose import dump_recipe
from glm.recipe.schema import ModelStageRecipe, TrainRecipe
from glm.runtime import Runtime
from glm.train.batch import MicroBatch, micro_batches
from glm.train.metrics import step_metrics
from glm.train.plan import Progress, count_steps, plan_step, whole_micro_batches
from glm.train.step import Trainer, next_token_loss

VALIDATION_ROWS = 32
"""At least; every rank takes as many whole micro-batches."""


def train(recipe: TrainRecipe) -> None:
    """Runs the stage from where its newest checkpoint stands to its end."""
    runtime = runtimes.start(recipe)
    folder = RunFolder.of(recipe)
    if runtime.is_first:
        prepare(recipe, folder)
    dist.barrier()
    batches = Batches(recipe, folder)
    trainer = Trainer(recipe)
    progress = restore(trainer, recipe, folder, runtime)
    total = count_steps(recipe)
    if runtime.is_first and progress.step == 0 and (recipe.parent is None or recipe.schedule.clock == "stage"):
        print(trainer.optimizer.table, flush=True)

    with MetricLog(
        folder.root, recipe.stage, total_steps=total, enabled=runtime.is_first, logging=recipe.logging,
        config=dump_recipe(recipe),
    ) as log:
        log.rewind(progress.step if progress.step else -1)
        while progress.stage_tokens < recipe.tokens:
            started = time.perf_counter()
            plan = plan_step(recipe, progress)
            rows = batches.rows(*share(progress.stage_tokens // recipe.sequence_length, plan.num_sequences, runtime))
            outcome = trainer.step(
                forward_passes(rows, trainer, recipe), next_token_loss, lr=plan.lr, mtp_weight=plan.mtp_weight, bias_update_rate=plan.bias_update_rate,
            )
            progress = progress.after(plan)
            log.line(progress.step, step_metrics(plan, progress, outcome, time.perf_counter() - started))
            if recipe.checkpoint.every_steps and progress.step % recipe.checkpoint.every_steps == 0:
                save(trainer, recipe, folder, runtime, progress)
        if progress.step not in store.checkpoint_steps(folder.checkpoints(recipe.stage)):
            save(trainer, recipe, folder, runtime, progress)
        log.line(progress.step, {"validation/loss": validate(trainer, recipe, batches, runtime)})
    runtimes.stop()


def share(first: int, count: int, runtime: Runtime) -> tuple[int, int]:
    """(first, count) of the rows of a step that this data-parallel rank trains on: the plan made them divide."""
    assert count % runtime.dp_size == 0, (count, runtime.dp_size)
    mine = count // runtime.dp_size
    return first + runtime.dp_rank * mine, mine


def validate(trainer: Trainer, recipe: TrainRecipe, batches: Batches, runtime: Runtime) -> float:
    """Mean loss a token on held-out rows."""
    unit = whole_micro_batches(recipe)
    rows = batches.validation_rows(-(-VALIDATION_ROWS // unit) * unit)
    mine = rows[runtime.dp_rank::runtime.dp_size]
    return trainer.evaluate(forward_passes(mine, trainer, recipe), next_token_loss)["loss"]


def forward_passes(rows, trainer: Trainer, recipe: TrainRecipe) -> list[MicroBatch]:
    packed = recipe.data.packing == "best_fit"
    return micro_batches(rows, recipe.batch.micro_batch_size, packed, trainer.device, multiple_of=trainer.row_multiple)


def restore(trainer: Trainer, recipe: ModelStageRecipe, folder: RunFolder, runtime: Runtime) -> Progress:
    """Continues from the stage's own newest checkpoint; else starts from its parent's last, else from random weights.

    On the run clock the parent's optimizer state goes on too: pre- and mid-training are one run.
    """
    own = store.newest_checkpoint(folder.checkpoints(recipe.stage))
    if own is not None:
        info = store.load(own, trainer.chunks, trainer.optimizer)
        if runtime.is_first:
            print(f"{recipe.stage}: continues after step {info.step} from {own}", flush=True)
        return Progress(step=info.step, stage_tokens=info.stage_tokens)
    if recipe.parent is not None:
        parent = store.newest_checkpoint(folder.checkpoints(recipe.parent))
        if parent is None:
            raise CheckpointError(
                str(folder.checkpoints(recipe.parent)), "no checkpoint", f"one of stage {recipe.parent}, which {recipe.stage} starts from",
                f"run stage {recipe.parent} first",
            )
        store.load(parent, trainer.chunks, trainer.optimizer if recipe.schedule.clock == "run" else None)
        if recipe.schedule.clock != "run":
            trainer.optimizer.masters_from_params()
    return Progress(step=0, stage_tokens=0)


def save(trainer: Trainer, recipe: ModelStageRecipe, folder: RunFolder, runtime: Runtime, progress: Progress) -> None:
    info = store.CheckpointInfo(
        stage=recipe.stage, step=progress.step, stage_tokens=progress.stage_tokens,
        run_tokens=recipe.run_tokens_before + progress.stage_tokens, rotary_base=recipe.rotary_base,
        megatron=recipe.megatron,
    )
    store.save(
        folder.checkpoints(recipe.stage), info, recipe.model, trainer.chunks, trainer.optimizer, runtime,
        recipe.checkpoint.keep,
    )
