"""Whether a checkpoint belongs to the recipe and the tokenizer that want to continue from it."""

from pathlib import Path

from pydantic import ValidationError

from glm.errors import CheckpointError
from glm.platform import active
from glm.recipe.saved import RESULT_UP_TO_ROUNDING, differing_keys
from glm.recipe.schema import RECIPE_OF_MAIN, ModelStageRecipe
from glm.tokenizer.load import digest_of


def refuse_other_recipe(checkpoint: Path, manifest: dict, recipe: ModelStageRecipe) -> list[str]:
    """Raises CheckpointError with the keys that differ. Returns what to say of those that may.

    A checkpoint without a recipe (one that was converted, or made by an earlier release) is compared by its tensors alone.
    """
    stored = manifest.get("recipe")
    if stored is None:
        return []
    made_with = _recipe(checkpoint, stored)
    changes = differing_keys(made_with, recipe)
    if changes:
        listed = "\n            ".join(changes)
        raise CheckpointError(
            str(checkpoint), f"another recipe; what differs (checkpoint -> now):\n            {listed}", "the recipe it was made with",
            "continue with that recipe, or give the new run a folder of its own: run_folder=PATH",
        )
    rounding = differing_keys(made_with, recipe, only=RESULT_UP_TO_ROUNDING)
    return [f"{recipe.stage}: continues under another layout, equal up to rounding: {'; '.join(rounding)}"] if rounding else []


def same_arithmetic(manifest: dict, recipe: ModelStageRecipe) -> bool:
    """What is computed again is equal bit for bit: the same kernels in the same order, each with a deterministic form."""
    stored = manifest.get("recipe")
    if stored is None or not (recipe.deterministic and active().fully_deterministic):
        return False
    return not differing_keys(_recipe(Path(), stored), recipe, only=RESULT_UP_TO_ROUNDING)


def tokenizer_digest(folder: Path) -> str | None:
    """Of what decides which ids a text becomes; None where there is no tokenizer."""
    return digest_of(folder) if (folder / "tokenizer.json").is_file() else None


def refuse_other_tokenizer(checkpoint: Path, manifest: dict, digest: str | None) -> None:
    """Raises CheckpointError when the checkpoint's ids mean other texts. Unknown on either side: not compared."""
    stored = manifest.get("tokenizer")
    if stored and digest and stored != digest:
        raise CheckpointError(
            f"{checkpoint}: tokenizer", f"{digest} (digest of tokenizer.json in the run folder)", f"{stored}, which it was trained with",
            "put that tokenizer back, or start a run of its own: run_folder=PATH",
        )


def _recipe(checkpoint: Path, stored: dict) -> ModelStageRecipe:
    try:
        return RECIPE_OF_MAIN[stored["main"]].model_validate(stored)
    except (KeyError, ValidationError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, KeyError) else "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:5]
        )
        raise CheckpointError(
            f"{checkpoint}: recipe", reason, "a recipe this release knows", "continue with the release that made the checkpoint",
        ) from error
