"""What is logged of a training step, by the names it has in metrics.jsonl; docs/operations.md says what each means."""

import math

import numpy as np

from glm.model.size import training_flops_per_token
from glm.recipe.schema import ModelStageRecipe
from glm.train.observe import Detail
from glm.train.plan import Progress, StepPlan
from glm.train.step import StepOutcome


class StepMetrics:
    """Metrics of one step after the other. Remembers since when each expert has had no token; a restart counts anew."""

    def __init__(self, recipe: ModelStageRecipe):
        self.recipe = recipe
        self._idle: np.ndarray | int = 0

    def __call__(
        self, plan: StepPlan, progress: Progress, outcome: StepOutcome, seconds: float, phases: dict[str, float] | None = None,
    ) -> dict:
        """``seconds``: of the step with its data; ``phases``: of each phase since the last line that was written."""
        told = {
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
        }
        told |= self._speed(outcome, seconds)
        told |= by_part(outcome.sums)
        if plan.mtp_weight:
            told |= {"mtp/accuracy": outcome.observed.mtp_accuracy, "mtp/probability": outcome.observed.mtp_probability}
        told |= self._balance(outcome)
        if outcome.observed.detail:
            told |= detail_metrics(outcome.observed.detail) | {
                "balance/load": [[round(share, 4) for share in layer] for layer in outcome.load],
                "balance/bias_low": outcome.observed.bias_low, "balance/bias_high": outcome.observed.bias_high,
            }
        return told | {f"phase/{name}_seconds": spent for name, spent in (phases or {}).items()}

    def _speed(self, outcome: StepOutcome, seconds: float) -> dict:
        """Operations of forward and backward on the tokens there were (glm.model.size), a rank and second, without recomputation."""
        flops = training_flops_per_token(self.recipe.model, 2 * outcome.attended)
        tflops = outcome.tokens * flops / seconds / self.recipe.world_size / 1e12
        peak = self.recipe.device.peak_tflops
        return {"train/attended": outcome.attended, "train/tflops": tflops} | ({"train/mfu": tflops / peak} if peak else {})

    def _balance(self, outcome: StepOutcome) -> dict:
        load = np.asarray(outcome.load)
        if not load.size:
            return {}
        over_mean = load.max(-1) * load.shape[-1]
        self._idle = np.where(load > 0, 0, self._idle + 1)
        dead = (self._idle >= self.recipe.logging.dead_after_steps).sum(-1)
        return {
            "balance/max_over_mean": float(over_mean.mean()),
            "balance/worst_violation": float(over_mean.max() - 1),
            "balance/max_violation": [round(value, 4) for value in (over_mean - 1).tolist()],
            "balance/bias_max": outcome.bias_max,
            "balance/dead_experts": int(dead.sum()),
        } | ({"balance/dead_by_layer": dead.tolist()} if dead.any() else {})


def by_part(sums: dict[str, tuple[float, float]]) -> dict:
    """Mean loss, and how many tokens it is of, for each source and band of positions that any token counts in."""
    told = {}
    for name, (total, count) in sums.items():
        kind, _, part = name.partition("/")
        if part and count:
            told |= {f"{kind}/loss/{part}": total / count, f"{kind}/tokens/{part}": int(count)}
    return told


def detail_metrics(detail: Detail) -> dict:
    logits = [value if math.isfinite(value) else None for value in detail.max_logits]
    told = {f"grad/norm/{part}": norm for part, norm in detail.grad_norms().items() if norm}
    told |= {f"update/rms/{part}": rms for part, rms in detail.update_rms().items() if rms is not None}
    told |= {f"update/by_layer/{part}": rms for part, rms in detail.update_rms_by_layer().items()}
    told["grad/by_layer"] = detail.grad_norms_by_layer()
    if any(value is not None for value in logits):
        told |= {"attention/max_logit": logits, "attention/largest_logit": max(value for value in logits if value is not None)}
    return told


def validation_metrics(means: dict[str, float]) -> dict:
    """``loss``, ``source/NAME`` and ``position/END`` of held-out rows."""
    return {f"validation/{name}": mean for name, mean in means.items()}
