"""The environment ``problems``: one procedurally generated question, one reply, exact reward."""

from dataclasses import dataclass

from glm.data.problems import TASKS, Problem, held_out_problems, training_problem
from posttrain.environments.registry import Prompt, register
from posttrain.rewards.exact import reward


FIRST_INDEX = 1_000_000_000
"""Numbers beyond those the training texts use, so that a prompt is not the text the model was trained on, answer and all."""


def _prompt(problem: Problem) -> Prompt:
    return Prompt(messages=({"role": "user", "content": problem.question},), problem=problem)


@register("problems")
@dataclass(frozen=True)
class Problems:
    """Single-turn. ``tasks`` are drawn in turn."""

    tasks: tuple[str, ...] = TASKS

    def training_prompt(self, index: int, seed: int) -> Prompt:
        """Prompt number ``index`` of a run; its question is never a held-out one."""
        task = self.tasks[index % len(self.tasks)]
        return _prompt(training_problem(task, FIRST_INDEX + index // len(self.tasks), seed))

    def held_out(self, count: int, seed: int) -> list[Prompt]:
        """``count`` different prompts that occur in no training text."""
        return [_prompt(problem) for problem in held_out_problems(self.tasks, count, seed)]

    def score(self, prompt: Prompt, reply_text: str) -> float:
        return reward(reply_text, prompt.problem)
