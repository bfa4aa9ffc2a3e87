"""What a step tells besides its loss: expert load, the MTP layer's guesses, and now and then gradient and update of every part.

Ranks collect tensors on the device; one sum and one maximum over all ranks and one transfer to the host end a step, whatever the
number of layers. Every number is contributed once: by the rank that owns it, or by the first of the ranks that hold the same.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from glm.model.chunks import named_modules
from glm.model.vocabulary import TABLES, real_rows
from glm.optim.build import TrainOptimizer
from glm.optim.grad_norm import squared_norm
from glm.recipe.sections import Model
from glm.train.parts import PARTS, cells

SAMPLE = 1 << 18
"""Numbers of a parameter (of this rank's part) whose change is measured, evenly spread; all of a smaller one."""


@dataclass(frozen=True)
class Detail:
    """What a detailed step measures. Layers count from 0, the MTP layer stands behind the last; what is in no layer behind that."""

    squares: torch.Tensor
    """float64 [layers + 2, parts]: sum of the squared gradient, before it was clipped."""
    changes: torch.Tensor
    """float64 [layers + 2, parts, 2]: sum of squares of what the step changed, weight decay included, over Muon's learning rate;
    and of how many numbers."""
    max_logits: list[float]
    """Largest attention logit of each layer before softmax (glm.model.attention_logits); -inf where none was seen."""

    def grad_norms(self) -> dict[str, float]:
        """{part: norm}."""
        return dict(zip(PARTS, self.squares.sum(0).sqrt().tolist()))

    def grad_norms_by_layer(self) -> list[float]:
        return self.squares[:len(self.max_logits)].sum(1).sqrt().tolist()

    def update_rms(self) -> dict[str, float | None]:
        """{part: root mean square}; None for a part that was not stepped."""
        return dict(zip(PARTS, _rms(self.changes.sum(0))))

    def update_rms_by_layer(self) -> dict[str, list[float | None]]:
        """{part that lies in layers: root mean square of each layer}."""
        layers = self.changes[:len(self.max_logits)]
        return {part: _rms(layers[:, index]) for index, part in enumerate(PARTS) if layers[:, index, 1].any()}


def _rms(sums: torch.Tensor) -> list[float | None]:
    return [math.sqrt(square / count) if count else None for square, count in sums.tolist()]


@dataclass(frozen=True)
class Observation:
    """Over the global batch. Rows of ``load`` and of the biases are layers with experts, the MTP layer's last."""

    load: list[list[float]]
    """Share of the routed tokens each expert got."""
    bias_low: list[float]
    bias_high: list[float]
    """Smallest and largest balancing bias of each router after the step."""
    mtp_loss: float
    mtp_accuracy: float
    """Share of the MTP layer's tokens that were its first choice."""
    mtp_probability: float
    """Mean probability the MTP layer gave to them."""
    detail: Detail | None


class Observer:
    """Watches the chunks of one rank."""

    def __init__(self, chunks: list[torch.nn.Module], optimizer: TrainOptimizer, shape: Model, device: torch.device):
        self.chunks, self.optimizer, self.shape, self.device = chunks, optimizer, shape, device
        modules = named_modules(chunks)
        dense, moe_layers = shape.num_dense_layers, shape.num_layers - shape.num_dense_layers
        self.routers = [
            (moe_layers if name.startswith("mtp.") else int(name.split(".")[2]) - dense, module)
            for name, module in modules if hasattr(module, "expert_bias")
        ]
        self.watches = [
            (shape.num_layers if name.startswith("mtp.") else int(name.split(".")[2]), module.watch)
            for name, module in modules if getattr(module, "watch", None) is not None
        ]
        self._routed = (moe_layers + shape.num_mtp_layers, shape.num_experts)
        self._layers = shape.num_layers + shape.num_mtp_layers
        self.begin(detailed=False)

    def begin(self, *, detailed: bool) -> None:
        """Before the forward passes of a step."""
        self.detailed = detailed
        self._load = torch.zeros(self._routed, dtype=torch.float64, device=self.device)
        self._squares = self._changes = torch.zeros(0, dtype=torch.float64, device=self.device)
        self._before: dict[torch.nn.Parameter, torch.Tensor] = {}
        for _, watch in self.watches:
            watch.on = detailed

    def note_load(self) -> None:
        """Before megatron moves the router bias and clears the counts."""
        for row, router in self.routers:
            self._load[row] = router.local_tokens_per_expert

    def before_update(self) -> None:
        """Gradients of a detailed step, before they are clipped, and what is to be compared after the update."""
        for _, watch in self.watches:
            watch.on = False
        if not self.detailed:
            return
        counted = [param for param in self.optimizer.params if self.optimizer.places[param].counted]
        self._squares = self._table(counted, lambda params: squared_norm([param.main_grad for param in params], self.device), self.device)
        owned = [param for param in self.optimizer.masters if self.optimizer.places[param].distinct]
        self._before = {param: self._sample(param).clone() for param in owned}

    def after_update(self, lr: float) -> None:
        if not self._before:
            return
        unit = lr or math.inf    # at a rate of 0 nothing changes

        def changed(params) -> torch.Tensor:
            return squared_norm([(self._sample(param) - self._before[param]).div_(unit) for param in params], self.device)

        host = torch.device("cpu")    # how many numbers there are is known there: one copy, not one of every layer and part
        counts = self._table(self._before, lambda params: sum(self._sample(param).numel() for param in params), host)
        self._changes = torch.cat([self._table(self._before, changed, self.device), counts.to(self.device, non_blocking=True)], dim=-1)
        self._before = {}

    def _sample(self, param: torch.nn.Parameter) -> torch.Tensor:
        """At most 2 x SAMPLE numbers of what is stepped, evenly spread, as a view; rows that no token has are left out."""
        master = self.optimizer.masters[param].detach()
        if self.optimizer.names[param] in TABLES:
            master = master[:real_rows(self.shape.vocab_size, len(master))]
        flat = master.view(-1)
        return flat[:: max(1, flat.numel() // SAMPLE)]

    def _table(self, params, function, device: torch.device) -> torch.Tensor:
        """float64 [layers + 2, parts, 1] of ``function`` over the parameters of each layer and part."""
        table = torch.zeros(self.shape.num_layers + 2, len(PARTS), 1, dtype=torch.float64, device=device)
        for (layer, part), some in cells(((self.optimizer.names[param], param) for param in params), self.shape.num_layers).items():
            table[layer, part] = function(some)
        return table

    def collect(self) -> Observation:
        """After the step, on all ranks."""
        mtp = sum(chunk.take_mtp_loss() for chunk in self.chunks).double()
        if parallel_state.get_tensor_model_parallel_rank() != 0:    # these hold the same tokens
            mtp = torch.zeros_like(mtp)
        table = (self.shape.num_layers + 2, len(PARTS))
        if self.detailed and not self._changes.numel():    # a rank that owns nothing
            self._changes = self._load.new_zeros(*table, 2)
        added = torch.cat([self._load.flatten(), mtp, self._squares.flatten(), self._changes.flatten()])
        largest = torch.full((2, self._routed[0]), -torch.inf, dtype=torch.float64, device=self.device)
        for row, router in self.routers:
            largest[0, row], largest[1, row] = -router.expert_bias.min(), router.expert_bias.max()
        logits = torch.full((self._layers,), -torch.inf, dtype=torch.float64, device=self.device)
        for row, watch in self.watches:
            seen = watch.take()
            if seen is not None:
                logits[row] = seen
        largest = torch.cat([largest.flatten(), logits])
        dist.all_reduce(added)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        load, mtp, squares, changes, low, high, logits = torch.cat([added, largest]).cpu().split([
            self._load.numel(), 4, self._squares.numel(), self._changes.numel(), self._routed[0], self._routed[0], self._layers,
        ])
        load = load.view(self._routed)
        loss, count, hits, probability = mtp.tolist()
        detail = Detail(squares.view(*table), changes.view(*table, 2), logits.tolist()) if self.detailed else None
        return Observation(
            load=(load / load.sum(-1, keepdim=True).clamp(min=1)).tolist(), bias_low=(-low).tolist(), bias_high=high.tolist(),
            mtp_loss=loss / max(count, 1), mtp_accuracy=hits / max(count, 1), mtp_probability=probability / max(count, 1),
            detail=detail,
        )
