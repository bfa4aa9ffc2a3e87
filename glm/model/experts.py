"""The routed experts of one rank as two stacked tensors and one grouped matrix product each.

Legend: E experts of this rank, H hidden, F inner width of an expert on this rank (expert tensor parallelism divides it),
T (token, expert) pairs of this rank, sorted by expert.
"""

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule

from glm.model.gated import swiglu_backward
from glm.model.gradients import adds_in_place, take_stale


class StackedExperts(MegatronModule):
    """Gated experts: ``weight1`` [E, 2F, H] is [gate; up] of each expert, ``weight2`` [E, H, F] is down.

    Under expert tensor parallelism a rank's output is a partial sum, which the token dispatcher adds up. Stacked parameters
    let Muon orthogonalise all experts of a layer in one batch, and keep one gradient buffer a layer.
    """

    in_place = False
    """Weight gradients expert by expert into the gradient buffer: fewer bytes, but the host must know how many tokens each
    expert has, and a GPU would wait for it. Set from the recipe's kernels.experts."""

    def __init__(self, num_local_experts, config, submodules=None, pg_collection=None):
        super().__init__(config=config)
        self.ep_rank, self.ep_size = pg_collection.ep.rank(), pg_collection.ep.size()
        self.etp_rank, self.etp_size = pg_collection.expt_tp.rank(), pg_collection.expt_tp.size()
        self.expert_dp_rank = pg_collection.expt_dp.rank()
        inner, hidden = config.moe_ffn_hidden_size // self.etp_size, config.hidden_size
        self.num_local_experts = num_local_experts
        self.weight1 = torch.nn.Parameter(torch.empty(num_local_experts, 2 * inner, hidden, dtype=config.params_dtype))
        self.weight2 = torch.nn.Parameter(torch.empty(num_local_experts, hidden, inner, dtype=config.params_dtype))
        for dimension, parameter in ((1, self.weight1), (2, self.weight2)):
            # Always the expert gradient buffer. Upstream does so only for EP > 1 (tensor_parallel/layers.py:829), and at
            # EP = ETP = 1 with TP > 1 expert gradients are then never summed over TP.
            parameter.allreduce = False
            parameter.is_stacked_expert = True
            parameter.tensor_model_parallel = self.etp_size > 1
            parameter.partition_dim = dimension if self.etp_size > 1 else -1
            parameter.partition_stride = 1

    def add_in_place(self, in_place: bool) -> None:
        """See ``in_place``; before DistributedDataParallel's first step."""
        self.in_place = in_place
        for parameter in self.parameters():
            parameter.owns_buffer = in_place

    def forward(self, hidden_TH, tokens_per_expert, probs_T):
        """Returns ([T, H], None): the routing weight is applied between the two products, as upstream does."""
        return _Experts.apply(hidden_TH, self.weight1, self.weight2, probs_T, tokens_per_expert, self.in_place), None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """One global tensor a weight, [experts, 2 x inner, H] and [experts, H, inner], cut along experts and inner width."""
        axis = len(sharded_offsets)
        replica = (0, 0, self.expert_dp_rank)

        def piece(key, data, inner_axis, place, places, replica_id=replica):
            return ShardedTensor.from_rank_offsets(
                key, data, *sharded_offsets, (axis, self.ep_rank, self.ep_size), (axis + inner_axis, place, places),
                replica_id=replica_id, prepend_axis_num=axis,
            )

        def gate_and_up(key, data, replica_id, flattened_range):
            return [
                piece(key, half, 1, self.etp_rank + number * self.etp_size, 2 * self.etp_size, replica_id)
                for number, half in enumerate(data.chunk(2, dim=1))
            ]

        first = piece(f"{prefix}weight1", self.weight1, 1, 0, 1)
        if self.etp_size > 1:  # gate and up are cut separately
            first = ShardedTensorFactory(
                first.key, self.weight1, gate_and_up, lambda halves: torch.cat(halves, dim=1), replica,
            )
        second = piece(f"{prefix}weight2", self.weight2, 2, self.etp_rank, self.etp_size)
        return {first.key: first, second.key: second}


class _Experts(torch.autograd.Function):
    """Both products and the activation between them; saves the tokens and the first product, recomputes the activation."""

    @staticmethod
    def forward(ctx, hidden_TH, weight1, weight2, probs_T, tokens_per_expert, in_place):
        ends = tokens_per_expert.cumsum(0).to(device=hidden_TH.device, dtype=torch.int32)
        both_TF = F.grouped_mm(hidden_TH, weight1.transpose(1, 2), offs=ends)
        gate_TF, up_TF = both_TF.chunk(2, dim=-1)
        inner_TF = F.silu(gate_TF).mul_(up_TF).mul_(probs_T.unsqueeze(-1))
        ctx.save_for_backward(hidden_TH, weight1, weight2, probs_T, both_TF, ends)
        ctx.counts = tokens_per_expert.tolist() if in_place else None
        return F.grouped_mm(inner_TF, weight2.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx, grad_TH):
        hidden_TH, weight1, weight2, probs_T, both_TF, ends = ctx.saved_tensors
        gate_TF, up_TF = both_TF.chunk(2, dim=-1)
        activated_TF = F.silu(gate_TF)
        inner_TF = activated_TF * up_TF
        grad_inner_TF = F.grouped_mm(grad_TH, weight2, offs=ends)
        grad_probs = (grad_inner_TF * inner_TF).sum(-1, dtype=probs_T.dtype)
        inner_TF.mul_(probs_T.unsqueeze(-1))
        grad_weight2 = _weight_gradient(weight2, grad_TH, inner_TF, ends, ctx.counts) if ctx.needs_input_grad[2] else None
        grad_both_TF = swiglu_backward(grad_inner_TF.mul_(probs_T.unsqueeze(-1)), both_TF, activated_TF)
        grad_weight1 = _weight_gradient(weight1, grad_both_TF, hidden_TH, ends, ctx.counts) if ctx.needs_input_grad[1] else None
        return F.grouped_mm(grad_both_TF, weight1, offs=ends), grad_weight1, grad_weight2, grad_probs, None, None


def _weight_gradient(weight_EOI, grad_TO, input_TI, ends, counts: list[int] | None) -> torch.Tensor | None:
    """[E, O, I], each expert's grad^T @ input; or None when it was added to ``main_grad``, expert by expert."""
    if counts is None or not adds_in_place(weight_EOI, grad_TO):
        return F.grouped_mm(grad_TO.t(), input_TI, offs=ends)
    beta = 0 if take_stale(weight_EOI) else 1
    for total_OI, grad, one in zip(weight_EOI.main_grad.unbind(0), grad_TO.split(counts), input_TI.split(counts)):
        total_OI.addmm_(grad.t(), one, beta=beta)
    return None
