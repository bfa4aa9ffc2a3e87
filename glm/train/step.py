"""One optimizer step: megatron's forward-backward, gradient reduction, clip, Muon and AdamW."""

from dataclasses import dataclass
from typing import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from glm.model.build import build_model
from glm.model.config import stage_config
from glm.model.experts import StackedExperts
from glm.model.initialize import initialize
from glm.optim.build import TrainOptimizer
from glm.optim.param_groups import is_frozen
from glm.platform import active
from glm.recipe.schema import ModelStageRecipe
from glm.train.batch import MicroBatch

LossFunction = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]
"""(losses [B, S], batch) -> (sum of the objective over tokens, token count, {metric: tensor [2] of sum and count})."""


@dataclass(frozen=True)
class StepOutcome:
    """What one step tells. Means are over the tokens of the global batch."""

    metrics: dict[str, float]
    grad_norm: float
    mtp_loss: float
    load: list[list[float]]
    """Share of the routed tokens each expert of each MoE layer got (the MTP layer's last)."""
    bias_max: float
    """Largest absolute router bias."""


class Trainer:
    """A model with its optimizer on this rank."""

    def __init__(self, recipe: ModelStageRecipe):
        self.recipe = recipe
        self.device = active().device
        self.config = stage_config(recipe)
        self.model = build_model(self.config, recipe.model, rotary_base=recipe.rotary_base)
        for module in self.model.modules():
            if isinstance(module, StackedExperts):
                module.grouped = recipe.kernels.experts == "grouped_mm"
        initialize(self.model, seed=recipe.seed, init_std=recipe.model.init_std, num_layers=recipe.model.num_layers)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not is_frozen(name, recipe.optimizer.frozen))
        inner = Float16Module(self.config, self.model) if self.config.bf16 else self.model
        self.parallel = DistributedDataParallel(
            self.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=False, overlap_grad_reduce=False,
            ),
            inner,
        )
        self.optimizer = TrainOptimizer(self.model, recipe.optimizer, recipe.model)
        self.routers = [module for module in self.model.modules() if hasattr(module, "expert_bias")]
        self.config.finalize_model_grads_func = self._finalize
        self.config.no_sync_func = self.parallel.no_sync
        self._forward_backward = get_forward_backward_func()
        self._load = torch.zeros(0)

    def step(
        self, batches: list[MicroBatch], loss: LossFunction, *, lr: float, mtp_weight: float, bias_update_rate: float,
    ) -> StepOutcome:
        """Accumulates the gradient of ``batches`` over all ranks and steps the parameters."""
        self.model.train()
        self.model.mtp_weight = 0.0 if "mtp" in self.recipe.optimizer.frozen else mtp_weight
        self.config.moe_router_bias_update_rate = bias_update_rate
        self.parallel.zero_grad_buffer()
        sums = self._run(batches, loss, forward_only=False)
        grad_norm = self.optimizer.step(lr)
        mtp = self.model.take_mtp_loss()
        dist.all_reduce(mtp, group=self._data_group)
        return StepOutcome(
            metrics={name: (total / count.clamp(min=1)).item() for name, (total, count) in sums.items()},
            grad_norm=grad_norm,
            mtp_loss=(mtp[0] / mtp[1].clamp(min=1)).item(),
            load=(self._load / self._load.sum(-1, keepdim=True).clamp(min=1)).tolist(),
            bias_max=max((router.expert_bias.abs().max().item() for router in self.routers), default=0.0),
        )

    @torch.no_grad()
    def evaluate(self, batches: list[MicroBatch], loss: LossFunction) -> dict[str, float]:
        """Means of the loss's metrics, without a gradient and without the MTP layer."""
        self.model.eval()
        weight, self.model.mtp_weight = self.model.mtp_weight, 0.0
        sums = self._run(batches, loss, forward_only=True)
        self.model.mtp_weight = weight
        return {name: (total / count.clamp(min=1)).item() for name, (total, count) in sums.items()}

    @property
    def _data_group(self):
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def _run(self, batches, loss: LossFunction, forward_only: bool) -> dict[str, torch.Tensor]:
        """Sums and counts of the metrics over all micro-batches and ranks."""
        def forward(iterator, model):
            batch = next(iterator)
            losses = model(
                input_ids=batch.token_ids, position_ids=batch.position_ids, attention_mask=None, labels=batch.labels,
                loss_mask=batch.loss_mask, packed_seq_params=batch.packed,
            )
            return losses, lambda output: loss(output, batch)

        results = self._forward_backward(
            forward_step_func=forward, data_iterator=iter(batches), model=self.parallel, num_microbatches=len(batches),
            seq_length=batches[0].token_ids.shape[1], micro_batch_size=batches[0].token_ids.shape[0],
            forward_only=forward_only,
        )
        names = list(results[0])
        sums = torch.stack([torch.stack([result[name] for result in results]).sum(0) for name in names]).double()
        dist.all_reduce(sums, group=self._data_group)
        return dict(zip(names, sums))

    def _finalize(self, model, num_tokens=None, **kwargs) -> None:
        """Notes the expert load before megatron moves the bias and clears the counts."""
        if self.routers:
            self._load = torch.stack([router.local_tokens_per_expert for router in self.routers])
            dist.all_reduce(self._load, group=self._data_group)
        finalize_model_grads(model, num_tokens, **kwargs)


def next_token_loss(losses: torch.Tensor, batch: MicroBatch):
    """Cross entropy summed over the tokens the mask keeps."""
    total, count = (losses.float() * batch.loss_mask).sum(), batch.loss_mask.sum()
    return total, count.int(), {"loss": torch.stack([total.detach(), count])}
