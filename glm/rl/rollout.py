"""Replies to prompts from the engines."""

import asyncio
import random
from dataclasses import dataclass

from glm.errors import EngineError, RecipeError
from glm.inference.client import EngineClient, Reply, Sampling
from glm.rl.types import Environment, Group, Prompt, Trajectory
from glm.tokenizer import encode_dialogue, stop_token_ids


def training_prompts(environments: list[Environment], step: int, count: int, seed: int) -> list[tuple[Environment, Prompt]]:
    """The prompts of one step, the environments in turn: a pure function of (seed, step)."""
    first = step * count
    return [
        (environments[index % len(environments)], environments[index % len(environments)].training_prompt(index, seed))
        for index in range(first, first + count)
    ]


@dataclass(frozen=True)
class Rollout:
    """Turns prompts into groups of scored replies."""

    clients: list[EngineClient]
    tokenizer: object
    context_length: int
    """Longest prompt plus reply of the engines."""

    async def groups(
        self, prompts: list[tuple[Environment, Prompt]], group_size: int, temperature: float, max_new_tokens: int,
    ) -> list[Group]:
        """``group_size`` replies to each prompt, in the order of the prompts. Requests are spread over the engines."""
        sampling = Sampling(
            temperature=temperature, max_new_tokens=max_new_tokens,
            stop_token_ids=tuple(stop_token_ids(self.tokenizer)),
        )
        prompt_ids = [self.encode(prompt) for _, prompt in prompts]
        self._require_room(prompts, prompt_ids, max_new_tokens)
        requests = [ids for ids in prompt_ids for _ in range(group_size)]
        replies = await self._generate(requests, sampling)
        texts = self.tokenizer.batch_decode([reply.token_ids for reply in replies])
        stops = [self.tokenizer.decode([token]) for token in stop_token_ids(self.tokenizer)]
        groups = []
        for number, (environment, prompt) in enumerate(prompts):
            span = range(number * group_size, (number + 1) * group_size)
            groups.append(Group(prompt, [
                self._trajectory(environment, prompt, prompt_ids[number], replies[i], texts[i], stops) for i in span
            ]))
        return groups

    def encode(self, prompt: Prompt) -> list[int]:
        return encode_dialogue(self.tokenizer, prompt.messages, add_generation_prompt=True)[0]

    def _require_room(self, prompts, prompt_ids: list[list[int]], max_new_tokens: int) -> None:
        """The engine would shorten the reply without a word."""
        longest, (_, prompt) = max(zip(prompt_ids, prompts), key=lambda pair: len(pair[0]))
        if len(longest) + max_new_tokens > self.context_length:
            raise RecipeError(
                "rollout.max_new_tokens", f"{max_new_tokens} beside a prompt of {len(longest)} tokens: {prompt.messages[-1]['content'][:60]!r}",
                f"at most {self.context_length} together (engine.context_length)", "raise engine.context_length or shorten the replies",
            )

    async def _generate(self, requests: list[list[int]], sampling: Sampling) -> list[Reply]:
        engines = len(self.clients)
        shares = await asyncio.gather(*(
            client.generate_batch(requests[number::engines], sampling) for number, client in enumerate(self.clients)
            if requests[number::engines]
        ))
        replies: list[Reply | None] = [None] * len(requests)
        for number, share in enumerate(shares):
            replies[number::engines] = share
        return replies

    def _trajectory(self, environment, prompt, prompt_ids, reply: Reply, text: str, stops: list[str]) -> Trajectory:
        shown = next((text.removesuffix(stop) for stop in stops if text.endswith(stop)), text)
        if reply.finish_reason not in ("stop", "length"):
            raise EngineError(
                "reply of an engine", f"finish reason {reply.finish_reason}", "stop or length",
                "the engine gave up a request, which is no answer of the model's: see its log beside the stage's metrics",
            )
        finished = reply.finish_reason == "stop"
        return Trajectory(
            prompt_ids=prompt_ids, token_ids=list(reply.token_ids), logprobs=list(reply.logprobs), text=shown,
            reward=environment.score(prompt, shown) if finished else 0.0,  # a reply cut off is no answer
            finish_reason=reply.finish_reason, weight_version=int(reply.weight_version),
            verify_rounds=reply.verify_rounds,
        )


def sample_of_groups(groups: list[Group], count: int, seed: int) -> list[tuple[Group, Trajectory]]:
    """A few trajectories for the log."""
    every = [(group, trajectory) for group in groups for trajectory in group.trajectories]
    return random.Random(seed).sample(every, min(count, len(every)))
