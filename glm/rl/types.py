"""What flows through reinforcement learning, from prompt to training sample.

    Prompt ─ G replies ─► Group of Trajectory ─ advantage ─► TrainSample ─ batching ─► micro-batches

A trajectory of the prompt "Reverse: a b c" (ids 5 6 7) answered by "c b a<|user|>" (ids 9 8 7 2):

    prompt_ids [5 6 7]   token_ids [9 8 7 2]   logprobs [-0.1 -0.3 -0.2 -0.0]   reward 1.0
"""

from dataclasses import dataclass
from typing import Protocol


class Prompt(Protocol):
    """One task to answer. ``task`` names its kind, for metrics."""

    messages: list[dict]
    task: str


class Environment(Protocol):
    """Where prompts come from and how replies are judged. Sees messages and text, never a token id."""

    def training_prompt(self, index: int, seed: int) -> Prompt:
        """Prompt number ``index``: a pure function of its arguments."""

    def held_out(self, count: int, seed: int) -> list[Prompt]:
        """Prompts that no training text contains."""

    def score(self, prompt: Prompt, reply_text: str) -> float:
        """The verified reward of a finished reply."""


@dataclass(frozen=True)
class Trajectory:
    """One sampled reply."""

    prompt_ids: list[int]
    token_ids: list[int]
    """[R] of the reply, the stop token included."""
    logprobs: list[float]
    """[R], under the distribution each token was drawn from."""
    text: str
    reward: float
    finish_reason: str
    weight_version: int
    verify_rounds: int | None


@dataclass(frozen=True)
class Group:
    """The G replies to one prompt."""

    prompt: Prompt
    trajectories: list[Trajectory]

    @property
    def rewards(self) -> list[float]:
        return [trajectory.reward for trajectory in self.trajectories]


@dataclass(frozen=True)
class TrainSample:
    """One trajectory as the trainer sees it.

    ``token_ids`` [P + R]; position t predicts token t + 1, so the reply's tokens are labels of positions P-1 … P+R-2.
    """

    token_ids: list[int]
    prompt_length: int
    rollout_logprobs: list[float]
    """[R]"""
    advantage: float
