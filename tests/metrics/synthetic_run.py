"""A run folder with believable numbers, written through the real MetricLog."""

import json
import math
import random
from pathlib import Path

from glm.checkpoint.run_folder import RunFolder, write_json
from glm.metrics.log import MetricLog

MODEL = {"num_layers": 4, "hidden_size": 128, "num_experts": 8, "experts_per_token": 2, "num_mtp_layers": 1, "vocab_size": 2048}


def write_training_stage(root: Path, stage: str, *, steps: int, first_token: int = 0, start_loss: float = 7.6,
                         parent: str | None = None) -> int:
    """A finished train stage of ``steps`` steps; returns the run tokens at its end."""
    folder, rng, tokens = RunFolder(root), random.Random(stage), first_token
    write_json(folder.recipe(stage), {"name": "synthetic", "main": "pretrain.train", "from": parent, "model": MODEL})
    with MetricLog(root, stage, total_steps=steps) as log:
        for step in range(1, steps + 1):
            batch = 1024 if step < steps // 2 else 2048
            tokens += batch
            loads = [[rng.uniform(1, 1 + 40 / step) for _ in range(8)] for _ in range(3)]
            loads = [[value / sum(layer) for value in layer] for layer in loads]
            loss = 2 + (start_loss - 2) * math.exp(-4 * step / steps) + rng.gauss(0, 0.05)
            log.line(step, {
                "train/loss": loss, "train/mtp_loss": loss + 0.2, "train/lr": 1e-3 * math.sin(math.pi * step / steps) + 1e-5,
                "train/grad_norm": 1 + rng.expovariate(3), "train/tokens": batch, "train/run_tokens": tokens,
                "train/stage_tokens": tokens - first_token, "train/mtp_weight": 0.3 if step < steps * 0.7 else 0.1,
                "train/bias_update_rate": 1e-3, "train/tokens_per_second": 9000 + rng.gauss(0, 300), "train/step_seconds": 0.2,
                "balance/max_over_mean": 8 * max(max(layer) for layer in loads), "balance/bias_max": 1e-3 * step,
                "balance/load": loads, "balance/max_violation": [8 * max(layer) - 1 for layer in loads],
                "source/loss/prose": loss + 0.1, "source/loss/code": loss - 0.1, "position/loss/2048": loss, "position/loss/4096": loss - 0.05,
                "attention/max_logit": [4.0, 5.0, 6.0, None], "update/by_layer/experts": [None, 0.2, 0.2, 0.2], "mtp/accuracy": 0.4,
                "phase/data_seconds": 0.01, "phase/forward_backward_seconds": 0.15, "phase/optimizer_seconds": 0.04,
            })
            if step % max(1, steps // 4) == 0:
                log.line(step, {"validation/loss": loss + 0.1})
    write_json(folder.done(stage), {"fingerprint": "0"})
    return tokens


def write_rl_stage(root: Path, stage: str = "rl_reasoning", *, steps: int = 40, finished: bool = True) -> None:
    folder, rng = RunFolder(root), random.Random(stage)
    recipe = {"name": "synthetic", "main": "posttrain.rl", "model": MODEL, "rl": {"max_logprob_difference": 1e-3}}
    write_json(folder.recipe(stage), recipe)
    with MetricLog(root, stage, total_steps=steps) as log:
        log.line(0, _evaluation("before", 0.243, 0.512))
        for step in range(1, steps + 1):
            reward = 0.25 + 0.4 * step / steps + rng.gauss(0, 0.03)
            log.line(step, {
                "rl/reward": reward, "rl/reward/reverse": reward + 0.1, "rl/reward/add": reward - 0.1,
                "rl/response_tokens": 12 + step / 10, "rl/acceptance_length": 2.6 + 0.2 * rng.random(),
                "rl/logprob_difference_mean": 1e-6 * (1 + rng.random()),
                "rl/logprob_difference_max": 2e-5 * (1 + rng.random()), "rl/entropy": 0.47 - 0.25 * step / steps, "rl/groups": 24,
                "rl/groups_dropped": rng.randint(4, 10), "rl/weight_version": step,
                "rl/rollout_seconds": 0.5 + 0.1 * rng.random(),
                "rl/train_seconds": 0.7, "rl/sync_seconds": 0.1, "rl/grad_norm": 0.4, "rl/mtp_loss": 0.7 - 0.3 * step / steps,
                "rl/rollout_tokens_per_second": 3300 + rng.gauss(0, 100),
            })
        if finished:
            log.line(steps, _evaluation("after", 0.487, 0.631))
            write_json(folder.done(stage), {"fingerprint": "1"})
    with folder.samples(stage).open("w", encoding="utf-8") as out:
        for step, reply, reward in ((1, "<think>c b a</think>\ncba", 1.0), (steps, "<script>alert('x')</script> ü", 0.0)):
            sample = {"step": step, "prompt": "Reverse: abc", "reply": reply, "reward": reward, "task": "reverse"}
            out.write(json.dumps(sample) + "\n")


def _evaluation(phase: str, sampled: float, greedy: float) -> dict:
    metrics = {"eval/phase": phase, "eval/sampled_accuracy": sampled, "eval/sampled_standard_error": 0.0123,
               "eval/greedy_accuracy": greedy, "eval/greedy_standard_error": 0.0234}
    for task, shift in (("reverse", 0.2), ("add", -0.15)):
        metrics |= {f"eval/{task}/sampled": sampled + shift, f"eval/{task}/sampled_standard_error": 0.03,
                    f"eval/{task}/greedy": greedy + shift, f"eval/{task}/greedy_standard_error": 0.05}
    return metrics
