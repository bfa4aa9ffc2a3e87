"""Advantages of the replies to one prompt."""

import statistics

EPSILON = 1e-6


def group_advantages(rewards: list[float], *, normalize_std: bool) -> list[float]:
    """reward - mean of the group, divided by the group's (population) standard deviation when asked (GRPO, arXiv 2402.03300).

    A group whose rewards are all alike teaches nothing: all zeros.
    """
    mean = statistics.fmean(rewards)
    deviation = statistics.pstdev(rewards)
    if deviation < EPSILON:
        return [0.0] * len(rewards)
    scale = deviation + EPSILON if normalize_std else 1.0
    return [(reward - mean) / scale for reward in rewards]
