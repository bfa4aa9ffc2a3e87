"""A model on one rank, outside a run: what converters, verification and tests work on."""

from glm import platform as platforms
from glm import runtime as runtimes
from glm.recipe.schema import StageRecipe
from glm.recipe.sections import Model
from glm.runtime import Runtime


def start(shape: Model, *, platform: str, seed: int = 0, threads: int = 1) -> Runtime:
    """Activates ``platform`` and makes this process a group of one rank. A second call changes the seed only."""
    platforms.activate(platform)
    return runtimes.start(StageRecipe(
        name="one-rank", stage="one-rank", main="none", run_folder=".", model=shape, platform=platform, seed=seed,
        launcher={"threads_per_rank": threads}, kernels={"attention": "sdpa"},
    ))


def build(shape: Model, *, params: str = "fp32", rotary_base: int, megatron: dict | None = None):
    """The network of ``shape``, its weights not yet filled, in ``params`` (fp32 or bf16), with the recipe's section ``megatron``; needs ``start`` before."""
    from glm.model.build import build_chunks
    from glm.model.config import transformer_config

    (model,) = build_chunks(transformer_config(shape, params=params, upstream=megatron), shape, rotary_base=rotary_base)
    return model.eval()
