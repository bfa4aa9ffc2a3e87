"""Recipes of tiny stages for the planner's tests."""

from glm.recipe.schema import TrainRecipe
from glm.recipe.sections import Model
from tests.model_fixture import tiny_shape


def stage(shape: Model | None = None, **changes) -> TrainRecipe:
    packing = changes.pop("packing", "truncate")
    return TrainRecipe(**{
        "name": "test", "stage": "test", "main": "pretrain.train", "run_folder": "unused", "model": shape or tiny_shape(), "platform": "host",
        "sequence_length": 64, "rotary_base": 10_000, "batch": {"tokens": 1024}, "tokens": 1024,
        "schedule": {"peak_lr": 1e-3, "final_lr": 1e-3}, "precision": {"params": "fp32"}, "kernels": {"attention": "sdpa"},
        "data": {"mixture": "unused", "packing": packing, "sources": {"prose": {"corpus": "prose", "share": 1.0}}},
    } | changes)
