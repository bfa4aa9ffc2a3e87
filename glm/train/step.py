"""One optimizer step: megatron's forward-backward, gradient reduction, clip, Muon and AdamW."""

from dataclasses import dataclass
from typing import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from glm.errors import DataError
from glm.metrics.phases import Phases
from glm.model import gradients
from glm.model.build import build_chunks
from glm.model.chunks import named_modules, named_parameters
from glm.model.config import stage_config
from glm.model.experts import StackedExperts
from glm.model.initialize import initialize
from glm.optim.build import TrainOptimizer
from glm.optim.param_groups import is_frozen
from glm.platform import active
from glm.recipe.schema import ModelStageRecipe
from glm.train.batch import MicroBatch, context_part
from glm.train.observe import Observation, Observer

LossFunction = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]
"""(losses [B, S], batch) -> (sum of the objective over tokens, sum of the batch's loss mask, {metric: tensor [2] of sum and count})."""


Refusal = Callable[[dict[str, float], float], str | None]
"""(metrics, gradient norm) of a step -> why it must not change the model, or None. The same on all ranks."""


@dataclass(frozen=True)
class StepOutcome:
    """What one step tells. Means are over the tokens of the global batch."""

    metrics: dict[str, float]
    """Means of the loss function's metrics; 0 for one that no token counted in."""
    grad_norm: float
    observed: Observation
    tokens: int
    """Of the global batch, masked and padding ones included."""
    attended: float
    """How many tokens one of them attends to, itself included, on average."""
    sums: dict[str, tuple[float, float]]
    """What ``metrics`` are the means of: (sum, count) over the global batch."""
    refused: str | None = None
    """Why the step changed nothing; None for a step that was made."""

    @property
    def mtp_loss(self) -> float:
        return self.observed.mtp_loss

    @property
    def load(self) -> list[list[float]]:
        """Share of the routed tokens each expert of each MoE layer got (the MTP layer's last)."""
        return self.observed.load

    @property
    def bias_max(self) -> float:
        """Largest absolute router bias."""
        return max((abs(bias) for bias in (*self.observed.bias_low, *self.observed.bias_high)), default=0.0)


class Trainer:
    """A model with its optimizer on this rank."""

    def __init__(self, recipe: ModelStageRecipe):
        self.recipe = recipe
        self.device = active().device
        self.config = stage_config(recipe)
        self.chunks = build_chunks(
            self.config, recipe.model, rotary_base=recipe.rotary_base, attention=recipe.kernels.attention,
        )
        initialize(self.chunks, seed=recipe.seed, shape=recipe.model)
        for name, parameter in named_parameters(self.chunks):
            parameter.requires_grad_(not is_frozen(name, recipe.optimizer.frozen))
        modules = named_modules(self.chunks)
        for _, module in modules:
            if isinstance(module, StackedExperts):
                module.add_in_place(recipe.kernels.experts == "host")
        self.routers = [(name, module) for name, module in modules if hasattr(module, "expert_bias")]
        self.parallel = [self._data_parallel(chunk) for chunk in self.chunks]
        self.optimizer = TrainOptimizer(named_parameters(self.chunks), recipe.optimizer, recipe.model)
        self.config.finalize_model_grads_func = self._finalize
        self.config.no_sync_func = [chunk.no_sync for chunk in self.parallel]
        if len(self.parallel) == 1:
            (self.config.no_sync_func,) = self.config.no_sync_func
        self.config.grad_scale_func = self._per_token
        self._forward_backward = get_forward_backward_func()
        self.observer = Observer(self.chunks, self.optimizer, recipe.model, self.device)
        self.phases = Phases()

    def _data_parallel(self, chunk: torch.nn.Module) -> DistributedDataParallel:
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=False, overlap_grad_reduce=False,
        )
        return DistributedDataParallel(self.config, settings, Float16Module(self.config, chunk) if self.config.bf16 else chunk)

    @property
    def row_multiple(self) -> int:
        """What the length of a packed row must divide by under this layout.

        Pipeline stages expect micro-batches of one length: there every pack is padded to whole rows of the recipe.
        """
        layout, recipe = self.recipe.layout, self.recipe
        if layout.pp > 1:
            return recipe.batch.micro_batch_size * recipe.sequence_length
        return layout.tp * (2 * layout.cp if layout.cp > 1 else 1)

    def set_head(self, *, mtp_detached: bool, temperature: float) -> None:
        """See Glm45Model's attributes of these names."""
        for chunk in self.chunks:
            chunk.mtp_detached, chunk.temperature = mtp_detached, temperature

    def step(
        self, batches: list[MicroBatch], loss: LossFunction, *, lr: float, mtp_weight: float, bias_update_rate: float,
        refusal: Refusal | None = None, detailed: bool = False,
    ) -> StepOutcome:
        """Accumulates the gradient of ``batches`` (whole rows of this data-parallel rank) over all ranks and steps the parameters.

        A step that ``refusal`` has something against leaves parameters, optimizer and router biases bit for bit as they were.
        ``detailed``: also measures what costs something (glm.train.observe.Detail).
        """
        biases_before = [router.expert_bias.clone() for _, router in self.routers]
        self.observer.begin(detailed=detailed)
        with self.phases("forward_backward"):
            sums = self.accumulate(batches, loss, mtp_weight=mtp_weight, bias_update_rate=bias_update_rate)
            told = _told(sums | {"batch": self._counts[1:]})    # waits for the device
        tokens, positions = told.pop("batch")
        metrics = {name: total / max(count, 1) for name, (total, count) in told.items()}
        with self.phases("optimizer"):
            grad_norm = self.optimizer.grad_norm()
            refused = refusal(metrics, grad_norm) if refusal else None
            self.observer.before_update()
            if refused is None:
                self.optimizer.step(lr, grad_norm)
            else:
                for (_, router), bias in zip(self.routers, biases_before):
                    router.expert_bias.copy_(bias)    # megatron moved it when the gradients were complete
            self.observer.after_update(lr)
            observed = self.observer.collect()
        return StepOutcome(
            metrics=metrics, grad_norm=grad_norm, observed=observed, tokens=int(tokens), attended=positions / max(tokens, 1) + 1,
            sums=told, refused=refused,
        )

    def accumulate(
        self, batches: list[MicroBatch], loss: LossFunction, *, mtp_weight: float, bias_update_rate: float,
    ) -> dict[str, torch.Tensor]:
        """Fills every parameter's ``main_grad`` with the mean over the tokens of the global batch, and moves the router biases.

        Returns {metric: float64 [2] of sum and count over all ranks}.
        """
        for chunk, parallel in zip(self.chunks, self.parallel):
            chunk.train()
            chunk.mtp_weight = 0.0 if "mtp" in self.recipe.optimizer.frozen else mtp_weight
            gradients.begin(parallel)
        self.config.moe_router_bias_update_rate = bias_update_rate
        return self._run(batches, loss, forward_only=False)

    @torch.no_grad()
    def evaluate(self, batches: list[MicroBatch], loss: LossFunction) -> dict[str, float]:
        """Means of the loss's metrics that any token counts in, without a gradient and without the MTP layer."""
        weights = [chunk.mtp_weight for chunk in self.chunks]
        for chunk in self.chunks:
            chunk.eval()
            chunk.mtp_weight = 0.0
        sums = self._run(batches, loss, forward_only=True)
        for chunk, weight in zip(self.chunks, weights):
            chunk.mtp_weight = weight
        return {name: total / count for name, (total, count) in _told(sums).items() if count}

    @property
    def _data_group(self):
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def _run(self, batches, loss: LossFunction, forward_only: bool) -> dict[str, torch.Tensor]:
        """Sums and counts of the metrics over all micro-batches and ranks."""
        cp_rank, cp_size = parallel_state.get_context_parallel_rank(), self.recipe.layout.cp
        parts = [context_part(batch, cp_rank, cp_size) for batch in batches]
        self._require_one_shape(parts)
        counts = torch.stack([
            torch.stack([part.loss_mask.sum() for part in parts]).double().sum(),
            torch.tensor(sum(part.loss_mask.numel() for part in parts), dtype=torch.float64, device=self.device),
            torch.stack([part.position_ids.sum() for part in parts]).double().sum(),
        ])
        dist.all_reduce(counts, group=self._data_group)
        self._counts = counts
        self._tokens = counts[0].clamp(min=1).float()
        for _, router in self.routers:
            router.trained_share = (counts[0] / counts[1]).float()

        def forward(iterator, model):
            batch = next(iterator)
            losses = model(
                input_ids=batch.token_ids, position_ids=batch.position_ids, attention_mask=None, labels=batch.labels,
                loss_mask=batch.loss_mask, packed_seq_params=batch.documents,
            )
            return losses, lambda output: loss(output, batch)

        results = self._forward_backward(
            forward_step_func=forward, data_iterator=[iter(parts) for _ in self.parallel], model=self.parallel,
            num_microbatches=len(parts), seq_length=batches[0].token_ids.shape[1],
            micro_batch_size=batches[0].token_ids.shape[0], forward_only=forward_only,
        )
        return self._over_all_ranks(results)

    def _require_one_shape(self, parts: list[MicroBatch]) -> None:
        """Pipeline stages are told one shape before a step. Raises DataError for micro-batches that differ."""
        shapes = sorted({tuple(part.token_ids.shape) for part in parts})
        if self.recipe.layout.pp > 1 and len(shapes) > 1:
            raise DataError(
                f"{self.recipe.stage}: micro-batches of one step", f"shapes {shapes[0]} and {shapes[-1]}",
                f"one shape with layout.pp {self.recipe.layout.pp}: stages agree on it before the step",
                "a sample longer than batch.micro_batch_size x sequence_length does this: raise sequence_length, or set layout.pp=1",
            )

    def _over_all_ranks(self, results: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """``results`` of the micro-batches, which only the last pipeline stage has, summed for all."""
        sums: dict[str, torch.Tensor] = {}
        if results:
            names = list(results[0])
            stacked = torch.stack([torch.stack([result[name] for result in results]).sum(0) for name in names]).double()
            dist.all_reduce(stacked, group=self._data_group)
            sums = dict(zip(names, stacked))
        if self.recipe.layout.pp > 1:
            told = [{name: pair.tolist() for name, pair in sums.items()}]
            source = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast_object_list(told, src=source, group=parallel_state.get_pipeline_model_parallel_group())
            sums = {name: torch.tensor(pair, dtype=torch.float64) for name, pair in told[0].items()}
        return sums

    def _per_token(self, loss: torch.Tensor) -> torch.Tensor:
        """Divides what is to be differentiated by the tokens of the global batch. megatron would divide the sums of gradients
        afterwards (finalize_model_grads), and read and write every one of them once more."""
        return loss / self._tokens

    def _finalize(self, model, num_tokens=None, **kwargs) -> None:
        """Notes the expert load before megatron moves the bias and clears the counts."""
        self.observer.note_load()
        for parallel in self.parallel:
            gradients.finish(parallel)
        finalize_model_grads(model, None, **kwargs)


def _told(sums: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Tensors [2] as numbers, in one transfer."""
    pairs = torch.stack([pair.to(next(iter(sums.values())).device) for pair in sums.values()]).tolist()
    return {name: (total, count) for name, (total, count) in zip(sums, pairs)}
