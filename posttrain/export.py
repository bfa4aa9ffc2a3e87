"""Stage: the newest checkpoint of the parent as a Hugging Face folder, RUN/export, and the proof that it is the same model."""

from glm import runtime as runtimes
from glm.checkpoint import store
from glm.checkpoint.run_folder import RunFolder
from glm.convert.to_hf import to_hf
from glm.convert.verify import verify
from glm.errors import CheckpointError, RecipeError
from glm.metrics.log import MetricLog
from glm.recipe.compose import dump_recipe
from glm.recipe.schema import ExportRecipe
from glm.weights.hf_folder import publish


def main(recipe: ExportRecipe) -> None:
    """Writes the folder, verifies it, and then puts it in its place. Raises CheckpointError without a checkpoint to export, or when the two models differ."""
    folder = RunFolder.of(recipe)
    if recipe.parent is None:
        raise RecipeError(f"{recipe.stage}: from", "no stage that trains weights", "one above it in the run file", "set from:")
    checkpoint = store.newest_checkpoint(folder.checkpoints(recipe.parent))
    if checkpoint is None:
        raise CheckpointError(
            str(folder.checkpoints(recipe.parent)), "no checkpoint", f"one of stage {recipe.parent}", f"run stage {recipe.parent} first",
        )
    _require_same_rotation(recipe, checkpoint)
    with MetricLog(folder.root, recipe.stage, total_steps=1, logging=recipe.logging, config=dump_recipe(recipe)) as log:
        log.rewind(0)
        draft = folder.export.with_name(f"{folder.export.name}.unverified")
        written = to_hf(checkpoint, draft)
        proof = verify(
            checkpoint, draft, platform=recipe.platform, num_tokens=recipe.verify_tokens,
            tolerance=recipe.verify_tolerance, seed=recipe.seed,
        )
        publish(draft, folder.export)
        log.line(1, {
            "export/max_logit_difference": proof.max_logit_difference,
            "export/tensors": written.tensors,
            "export/bytes": written.bytes,
        } | ({} if proof.mtp_loss_difference is None else {"export/mtp_loss_difference": proof.mtp_loss_difference}))
    print(
        f"{recipe.stage}: {checkpoint.name} of {recipe.parent} -> {folder.export}: {written.tensors} tensors, {written.bytes:,} bytes; "
        f"transformers' logits differ by at most {proof.max_logit_difference:.2e}", flush=True,
    )
    runtimes.stop()


def _require_same_rotation(recipe: ExportRecipe, checkpoint) -> None:
    trained = store.read_info(checkpoint)[0].rotary_base
    if trained != recipe.rotary_base:
        raise RecipeError(
            f"{recipe.stage}: rotary_base", f"{recipe.rotary_base:,}", f"{trained:,}, with which {recipe.parent} trained",
            f"set rotary_base={trained} for stage {recipe.stage} in the run file",
        )
