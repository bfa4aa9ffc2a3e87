"""Mid-training: repositories, reasoning and long documents, packed whole, at 32K and 128K."""

from glm.recipe.schema import TrainRecipe
from glm.train.loop import train


def main(recipe: TrainRecipe) -> None:
    train(recipe)
