"""Reinforcement learning from verified rewards: GRPO without KL, rolled out in SGLang."""

from glm.recipe.schema import RLRecipe
from glm.rl.controller import reinforce
from posttrain.environments import environment


def main(recipe: RLRecipe) -> None:
    reinforce(recipe, [environment(name) for name in recipe.rl.environments])
