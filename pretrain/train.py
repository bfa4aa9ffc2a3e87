"""Pre-training: next-token and MTP losses on truncated, concatenated documents at 4K."""

from glm.recipe.schema import TrainRecipe
from glm.train.loop import train


def main(recipe: TrainRecipe) -> None:
    train(recipe)
