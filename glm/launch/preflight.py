"""What would stop a later stage, asked before the first one starts. Imports no torch."""

from importlib.util import find_spec

from glm.errors import PlatformError
from glm.launch.cluster import on_cluster, require_allocation
from glm.platform.probe import probe
from glm.recipe.check import refuse_unproved
from glm.recipe.schema import ChatRecipe, ExportRecipe, ModelStageRecipe, StageRecipe


def preflight(recipes: list[StageRecipe]) -> None:
    """Raises the first UserError one of ``recipes`` would end with for its recipe, a missing package, allocation or device.

    Devices are asked for last, once a platform, in a process that imports torch. Those of a cluster are on other machines
    and cannot be asked from here.
    """
    for recipe in recipes:
        refuse_unproved(recipe)
        _require_wandb(recipe)
        if on_cluster(recipe):
            require_allocation(recipe)
    highest: dict[str, int] = {}
    for recipe in recipes:
        if isinstance(recipe, (ModelStageRecipe, ExportRecipe, ChatRecipe)) and not on_cluster(recipe):
            highest[recipe.platform] = max(highest.get(recipe.platform, 0), recipe.launcher.ranks_per_node - 1)
    for platform, local_rank in highest.items():
        if platform != "host":    # the CPU is there
            probe(platform, local_rank)


def _require_wandb(recipe: StageRecipe) -> None:
    """Stages with metrics: those that train, and the export."""
    if not isinstance(recipe, (ModelStageRecipe, ExportRecipe)) or recipe.logging.wandb == "off":
        return
    if find_spec("wandb") is None:
        raise PlatformError(
            f"logging.wandb of stage {recipe.stage}", f"{recipe.logging.wandb}, but wandb is not installed", "the wandb package",
            "pip install wandb, or set logging.wandb=off",
        )
