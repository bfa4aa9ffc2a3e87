"""Held-out accuracy, sampled and greedy, with standard errors and per task."""

import math
import statistics

from glm.rl.rollout import Rollout
from glm.rl.types import Environment, Group


async def evaluate(
    rollout: Rollout, environments: list[Environment], *, prompts: int, samples: int, max_new_tokens: int, seed: int,
) -> tuple[dict[str, float], list[Group]]:
    """Metrics ``eval/...`` and the sampled groups, at temperature 1 whatever the rollouts use.

    ``prompts`` are split evenly over the environments and depend on ``seed`` only: the same before and after.
    """
    each = -(-prompts // len(environments))
    held_out = [(environment, prompt) for environment in environments for prompt in environment.held_out(each, seed)]
    sampled = await rollout.groups(held_out, samples, 1.0, max_new_tokens)
    greedy = await rollout.groups(held_out, 1, 0.0, max_new_tokens)
    metrics = summary(sampled, "sampled") | summary(greedy, "greedy")
    for task in dict.fromkeys(group.prompt.task for group in sampled):
        for kind, groups in (("sampled", sampled), ("greedy", greedy)):
            mean, error = mean_and_error([group for group in groups if group.prompt.task == task])
            metrics |= {f"eval/{task}/{kind}": mean, f"eval/{task}/{kind}_standard_error": error}
    return metrics, sampled


def summary(groups: list[Group], kind: str) -> dict[str, float]:
    mean, error = mean_and_error(groups)
    replies = [trajectory for group in groups for trajectory in group.trajectories]
    return {
        f"eval/{kind}_accuracy": mean,
        f"eval/{kind}_standard_error": error,
        f"eval/{kind}_thinking": statistics.fmean(_thinks(trajectory.text) for trajectory in replies),
        f"eval/{kind}_finished": statistics.fmean(trajectory.finish_reason == "stop" for trajectory in replies),
    }


def mean_and_error(groups: list[Group]) -> tuple[float, float]:
    """Mean reward and its standard error. The prompt is the unit: replies to one prompt are not independent."""
    means = [statistics.fmean(group.rewards) for group in groups]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return statistics.fmean(means), error


def _thinks(text: str) -> bool:
    """Whether the think part says anything: separates a change of style from a gain of skill."""
    inside = text.partition("<think>")[2].partition("</think>")[0]
    return bool(inside.strip())
