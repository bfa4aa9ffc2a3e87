"""Supervised fine-tuning: dialogues packed whole, loss on what the assistant writes."""

from glm.recipe.schema import TrainRecipe
from glm.train.loop import train


def main(recipe: TrainRecipe) -> None:
    train(recipe)
