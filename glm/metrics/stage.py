"""One stage of a run as the report draws it."""

from dataclasses import dataclass

import numpy as np

from glm.metrics.read import StageMetrics


@dataclass(frozen=True)
class Stage:
    """What the report knows of one stage. ``offset`` moves its token counts behind those of the stage before."""

    name: str
    metrics: StageMetrics
    recipe: dict
    done: bool
    color: str
    offset: float = 0.0

    @property
    def is_training(self) -> bool:
        return bool(self.metrics.having("train/loss"))

    def on_run_tokens(self, name: str) -> tuple[list[float], list[float]]:
        """(run tokens, values) of a metric; lines that carry no token count take that of their step."""
        steps, tokens = self.metrics.series("train/run_tokens")
        at, values = self.metrics.series(name)
        if not steps:
            return at, values
        return list(np.interp(at, steps, tokens) + self.offset), values
