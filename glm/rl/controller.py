"""The loop of reinforcement learning.

    rank 0                                         all training ranks
    prompts of this step ─ engines ─ groups
    rewards ─ advantages ─ samples ─ dealt ──────► broadcast ─ policy step (MTP layer beside it, detached)
    pause engines ◄─ load target and draft ◄────── gather weights
    compare digests ─ next step

One update a rollout, so every sample is on policy: its weight version is the trainer's.
"""

import asyncio
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from glm import runtime as runtimes
from glm.checkpoint.run_folder import RunFolder, write_atomically
from glm.errors import EngineError
from glm.inference.client import EngineClient
from glm.inference.speculative import acceptance_length
from glm.metrics.log import MetricLog
from glm.recipe.check import refuse_unproved
from glm.recipe.compose import dump_recipe
from glm.recipe.schema import RLRecipe
from glm.rl.advantage import group_advantages
from glm.rl.batching import deal, policy_batch
from glm.rl.evaluate import evaluate
from glm.rl.loss import policy_loss
from glm.rl.placement import engines
from glm.rl.rollout import Rollout, sample_of_groups, training_prompts
from glm.rl.types import Environment, Group, TrainSample
from glm.rl.weight_sync import WeightSync
from glm.runtime import Runtime
from glm.tokenizer import load_tokenizer
from glm.train.plan import StepPlan, plan_step
from glm.train.resume import StageCheckpoints
from glm.train.step import StepOutcome, Trainer
from glm.train.stop import StopRequest


def reinforce(recipe: RLRecipe, environments: list[Environment]) -> None:
    """Runs the stage from its newest checkpoint to ``rl.steps``."""
    refuse_unproved(recipe)
    runtime = runtimes.start(recipe)
    folder = RunFolder.of(recipe)
    trainer = Trainer(recipe)
    trainer.set_head(mtp_detached=True, temperature=recipe.rollout.temperature)
    checkpoints = StageCheckpoints(recipe, folder, runtime, trainer)
    progress = checkpoints.restore().progress
    sync = WeightSync(recipe, folder.tokenizer, runtime)
    sync.export(trainer)
    with ExitStack() as stack:
        stack.callback(sync.close)
        log = stack.enter_context(MetricLog(
            folder.root, recipe.stage, total_steps=recipe.rl.steps, enabled=runtime.is_first, logging=recipe.logging,
            config=dump_recipe(recipe),
        ))
        log.rewind(progress.step if progress.step else -1)
        stop = stack.enter_context(StopRequest(recipe.stage, folder, runtime))
        actor = None
        if runtime.is_first:
            if progress.step == 0:
                print(trainer.optimizer.table, flush=True)
            actor = stack.enter_context(Actor(recipe, environments, folder, sync, progress.step))
            rewind_samples(folder.samples(recipe.stage), progress.step)
        if actor and progress.step == 0:
            log.line(0, {"eval/phase": "before"} | actor.evaluate(0))
        while progress.step < recipe.rl.steps:
            plan = plan_step(recipe, progress)
            log.line(plan.step + 1, step(recipe, trainer, actor, sync, runtime, plan))
            progress = progress.after(plan)
            checkpoints.after_step(progress)
            stop.obey(progress, save=checkpoints.close)
            if actor and recipe.evaluation.every_steps and progress.step % recipe.evaluation.every_steps == 0 \
                    and progress.step < recipe.rl.steps:
                log.line(progress.step, {"eval/phase": "during"} | actor.evaluate(progress.step))
        checkpoints.close(progress)
        if actor:
            log.line(progress.step, {"eval/phase": "after"} | actor.evaluate(progress.step))
    runtimes.stop()


def step(recipe: RLRecipe, trainer: Trainer, actor: "Actor | None", sync: WeightSync, runtime: Runtime, plan: StepPlan) -> dict:
    """One rollout, one update, one push. Returns the metrics (empty on ranks other than 0)."""
    rolled = actor.rollout(plan.step) if actor else None
    started = time.perf_counter()
    samples = broadcast_samples(rolled.samples if rolled else [], recipe, runtime)
    outcome = None
    if samples:
        batches = [policy_batch(batch, trainer.device, multiple_of=trainer.row_multiple) for batch in samples]
        clip = policy_loss(recipe.rl.clip_low, recipe.rl.clip_high)
        outcome = trainer.step(
            batches, clip, lr=plan.lr, mtp_weight=plan.mtp_weight, bias_update_rate=plan.bias_update_rate,
        )
        refuse_mismatch(recipe, outcome, plan.step)
    train_seconds = time.perf_counter() - started
    push = sync.push(trainer, actor.clients if actor else [], plan.step + 1)
    if not actor:
        return {}
    return rolled.metrics | update_metrics(outcome) | {
        "rl/lr": plan.lr, "rl/train_seconds": train_seconds, "rl/sync_seconds": push.seconds,
        "rl/sync_bytes": push.bytes, "rl/sync_tensors_proved": push.tensors, "rl/weight_version": plan.step + 1,
    }


def rewind_samples(path: Path, step: int) -> None:
    """Drops the sample dialogues of steps that will be done again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_atomically(path, "".join(line for line in lines if step and json.loads(line)["step"] < step))


def broadcast_samples(samples: list[TrainSample], recipe: RLRecipe, runtime: Runtime) -> list[list[TrainSample]]:
    """Rank 0's samples, dealt; returns this rank's micro-batches (empty on all ranks when nothing can be learned)."""
    tokens = recipe.batch.micro_batch_size * recipe.sequence_length
    in_turn = recipe.layout.pp if recipe.layout.vpp > 1 else 1    # micro-batches that the interleaved schedule takes at a time
    dealt = [deal(samples, runtime.dp_size, tokens, in_turn) if samples else None] if runtime.is_first else [None]
    dist.broadcast_object_list(dealt, src=0)
    return dealt[0][runtime.dp_rank] if dealt[0] else []


def refuse_mismatch(recipe: RLRecipe, outcome: StepOutcome, number: int) -> None:
    found = outcome.metrics["logprob_difference"]
    if not found <= recipe.rl.max_logprob_difference:  # NaN is a mismatch too
        raise EngineError(
            f"{recipe.stage}, step {number + 1}: logprobs of rollout and trainer",
            f"mean absolute difference {found:.2e}", f"at most {recipe.rl.max_logprob_difference:.0e} (rl.max_logprob_difference)",
            "engine and trainer do not compute the same model: compare precision, router and weight versions",
        )


def update_metrics(outcome: StepOutcome | None) -> dict:
    if outcome is None:
        return {"rl/skipped_update": 1}
    return {
        "rl/objective": outcome.metrics["objective"],
        "rl/logprob_difference_mean": outcome.metrics["logprob_difference"],
        "rl/logprob_outliers": outcome.metrics["logprob_outliers"],
        "rl/entropy": -outcome.metrics["logprob"],
        "rl/clipped": outcome.metrics["clipped"],
        "rl/grad_norm": outcome.grad_norm,
        "rl/mtp_loss": outcome.mtp_loss,
        "balance/load": [[round(share, 4) for share in layer] for layer in outcome.load],
        "balance/max_over_mean": statistics.fmean(max(layer) * len(layer) for layer in outcome.load),
    }


class RolledOut:
    """The result of one rollout: samples to train on and what to log."""

    def __init__(self, groups: list[Group], recipe: RLRecipe, seconds: float):
        self.samples: list[TrainSample] = []
        dropped = 0
        for group in groups:
            advantages = group_advantages(group.rewards, normalize_std=recipe.rl.normalize_std)
            if recipe.rl.drop_uniform_groups and not any(advantages):
                dropped += 1
                continue
            self.samples += [
                TrainSample(one.prompt_ids + one.token_ids, len(one.prompt_ids), one.logprobs, advantage)
                for one, advantage in zip(group.trajectories, advantages)
            ]
        replies = [trajectory for group in groups for trajectory in group.trajectories]
        tokens = sum(len(reply.token_ids) for reply in replies)
        self.metrics = {
            "rl/reward": statistics.fmean(reply.reward for reply in replies),
            "rl/groups": len(groups),
            "rl/groups_dropped": dropped,
            "rl/samples": len(self.samples),
            "rl/response_tokens": tokens / len(replies),
            "rl/cut_off": statistics.fmean(reply.finish_reason != "stop" for reply in replies),
            "rl/rollout_seconds": seconds,
            "rl/rollout_tokens_per_second": tokens / seconds,
        }
        accepted = acceptance_length(replies)
        if accepted is not None:
            self.metrics["rl/acceptance_length"] = accepted
        for task in sorted({group.prompt.task for group in groups}):
            rewards = [reward for group in groups if group.prompt.task == task for reward in group.rewards]
            self.metrics[f"rl/reward/{task}"] = statistics.fmean(rewards)


class Actor:
    """Rank 0's side: the engines, and everything asked of them."""

    def __init__(self, recipe: RLRecipe, environments: list[Environment], folder: RunFolder, sync: WeightSync, version: int):
        self.recipe, self.environments, self.folder, self.sync, self.version = recipe, environments, folder, sync, version
        self.clients: list[EngineClient] = []
        self._stack = ExitStack()

    def __enter__(self) -> "Actor":
        """Starts the servers on the trainer's weights and proves that they hold them."""
        try:
            servers = self._stack.enter_context(
                engines(self.recipe, self.sync.folder, self.folder.stage(self.recipe.stage), self.version)
            )
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
            self._stack.callback(self._loop.close)
            timeout = self.recipe.engine.request_timeout_seconds
            for server in servers:
                client = EngineClient(server.url, server.spec.api_key, request_timeout_seconds=timeout)
                self.clients.append(self._run(client.__aenter__()))
                self._stack.callback(lambda client=client: self._run(client.__aexit__(None, None, None)))
            self.sync.prove(self.clients)
            limit = self.recipe.engine.context_length or self.recipe.model.max_position
            self._rollout = Rollout(self.clients, load_tokenizer(self.folder.tokenizer), context_length=limit)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def rollout(self, number: int) -> RolledOut:
        """The groups of step ``number``, scored."""
        settings = self.recipe.rollout
        started = time.perf_counter()
        prompts = training_prompts(self.environments, number, settings.prompts_per_step, self.recipe.seed)
        groups = self._run(self._rollout.groups(prompts, settings.group_size, settings.temperature, settings.max_new_tokens))
        seconds = time.perf_counter() - started
        self._require_version(groups, number)
        self._write_samples(groups, number)
        return RolledOut(groups, self.recipe, seconds)

    def evaluate(self, number: int) -> dict[str, float]:
        """Held-out accuracy now."""
        settings = self.recipe.evaluation
        started = time.perf_counter()
        metrics, groups = self._run(evaluate(
            self._rollout, self.environments, prompts=settings.prompts, samples=settings.samples, max_new_tokens=self.recipe.rollout.max_new_tokens,
            seed=self.recipe.seed,
        ))
        self._write_samples(groups, number)
        return metrics | {"eval/seconds": time.perf_counter() - started}

    def _run(self, awaitable):
        return self._loop.run_until_complete(awaitable)

    def _require_version(self, groups: list[Group], number: int) -> None:
        versions = {reply.weight_version for group in groups for reply in group.trajectories}
        if versions != {number}:
            raise EngineError(
                f"{self.recipe.stage}, step {number + 1}: weight version of the replies", f"{sorted(versions)}", f"{number}",
                "an engine kept old weights: see its log beside the stage's metrics",
            )

    def _write_samples(self, groups: list[Group], number: int) -> None:
        path = self.folder.samples(self.recipe.stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as out:
            for group, reply in sample_of_groups(groups, 2, number):
                out.write(json.dumps({
                    "step": number, "prompt": group.prompt.messages[-1]["content"], "reply": reply.text,
                    "reward": reply.reward, "task": group.prompt.task,
                }, ensure_ascii=False) + "\n")
