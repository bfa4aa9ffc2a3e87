"""What is logged of a training step, by the names it has in metrics.jsonl."""

import torch

from glm.train.plan import Progress, StepPlan
from glm.train.step import StepOutcome


def step_metrics(plan: StepPlan, progress: Progress, outcome: StepOutcome, seconds: float) -> dict:
    load = torch.tensor(outcome.load)
    return {
        "train/loss": outcome.metrics["loss"],
        "train/mtp_loss": outcome.mtp_loss,
        "train/lr": plan.lr,
        "train/grad_norm": outcome.grad_norm,
        "train/tokens": plan.tokens,
        "train/run_tokens": plan.run_tokens + plan.tokens,
        "train/stage_tokens": progress.stage_tokens,
        "train/sequence_length": plan.sequence_length,
        "train/mtp_weight": plan.mtp_weight,
        "train/bias_update_rate": plan.bias_update_rate,
        "train/tokens_per_second": plan.tokens / seconds,
        "train/step_seconds": seconds,
        "balance/max_over_mean": (load.max(-1).values * load.shape[-1]).mean().item(),
        "balance/bias_max": outcome.bias_max,
        "balance/load": [[round(share, 4) for share in layer] for layer in outcome.load],
    }
