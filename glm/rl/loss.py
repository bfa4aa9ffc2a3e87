"""The policy objective. Legend: all tensors [B, S], fp32; position t holds what belongs to the token it predicts."""

import torch

from glm.train.batch import MicroBatch


def clipped_objective(logprobs, rollout_logprobs, advantages, *, clip_low: float, clip_high: float) -> torch.Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A) a token, r = exp(logprob - rollout logprob) (PPO; GRPO without KL, report 3.2).

    With one update a rollout r is 1 up to rounding and the gradient is that of -A log p.
    """
    ratio = torch.exp(logprobs - rollout_logprobs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def policy_loss(clip_low: float, clip_high: float):
    """A loss for Trainer.step: the model's per-token losses are -logprob of the label at the rollout's temperature.

    The objective is summed over reply tokens; megatron divides by those of the global batch (token mean). Metrics are
    [sum, count] pairs over reply tokens.
    """
    def loss(losses: torch.Tensor, batch: MicroBatch):
        mask, rollout = batch.loss_mask, batch.extra["rollout_logprobs"]
        logprobs = -losses.float()
        objective = clipped_objective(
            logprobs, rollout, batch.extra["advantages"], clip_low=clip_low, clip_high=clip_high
        ) * mask
        with torch.no_grad():
            count = mask.sum()
            gap = (logprobs - rollout) * mask
            ratio = torch.exp(gap)
            clipped = ((ratio < 1 - clip_low) | (ratio > 1 + clip_high)) * mask
            metrics = {
                "objective": torch.stack([objective.sum(), count]),
                "logprob_difference": torch.stack([gap.abs().sum(), count]),
                "logprob": torch.stack([(logprobs * mask).sum(), count]),
                "clipped": torch.stack([clipped.sum(), count]),
                # a maximum cannot be summed over ranks: the share of tokens past ten times the usual bound can
                "logprob_outliers": torch.stack([(gap.abs() > 1e-2).float().sum(), count]),
            }
        return objective.sum(), count.int(), metrics

    return loss
