"""The routed experts of one rank as two stacked tensors and one grouped matrix product each.

Legend: E experts of this rank, H hidden, F inner width, T (token, expert) pairs of this rank, sorted by expert.
"""

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.module import MegatronModule


class StackedExperts(MegatronModule):
    """Gated experts: ``weight1`` [E, 2F, H] is [gate; up] of each expert, ``weight2`` [E, H, F] is down.

    Stacked parameters let Muon orthogonalise all experts of a layer in one batch, and keep one gradient buffer a layer.
    """

    grouped = True
    """One grouped product; False loops over the experts (the reference the tests compare with)."""

    def __init__(self, num_local_experts, config, submodules=None, pg_collection=None):
        super().__init__(config=config)
        inner, hidden = config.moe_ffn_hidden_size, config.hidden_size
        self.num_local_experts = num_local_experts
        self.weight1 = torch.nn.Parameter(torch.empty(num_local_experts, 2 * inner, hidden, dtype=config.params_dtype))
        self.weight2 = torch.nn.Parameter(torch.empty(num_local_experts, hidden, inner, dtype=config.params_dtype))
        self.ep_rank, self.ep_size = pg_collection.ep.rank(), pg_collection.ep.size()
        self.expert_dp_rank = pg_collection.expt_dp.rank()
        for parameter in self.parameters():
            # Always the expert gradient buffer. Upstream does so only for EP > 1 (tensor_parallel/layers.py:829), and at
            # EP = ETP = 1 with TP > 1 expert gradients are then never summed over TP.
            parameter.allreduce = False
            parameter.is_stacked_expert = True

    def forward(self, hidden_TH, tokens_per_expert, probs_T):
        """Returns ([T, H], None): the routing weight is applied between the two products, as upstream does."""
        multiply = _grouped_product if self.grouped else _looped_product
        gate_TF, up_TF = multiply(hidden_TH, self.weight1, tokens_per_expert).chunk(2, dim=-1)
        inner_TF = F.silu(gate_TF) * up_TF * probs_T.unsqueeze(-1).to(gate_TF.dtype)
        return multiply(inner_TF, self.weight2, tokens_per_expert), None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """One global [experts, ...] tensor a weight, cut along the experts."""
        axis = len(sharded_offsets)
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}", parameter, *sharded_offsets, (axis, self.ep_rank, self.ep_size),
                replica_id=(0, 0, self.expert_dp_rank), prepend_axis_num=axis,
            )
            for name, parameter in self.named_parameters()
        }


def _grouped_product(input_TI, weight_EOI, tokens_per_expert) -> torch.Tensor:
    ends = tokens_per_expert.cumsum(0).to(device=input_TI.device, dtype=torch.int32)
    return F.grouped_mm(input_TI, weight_EOI.transpose(1, 2), offs=ends)


def _looped_product(input_TI, weight_EOI, tokens_per_expert) -> torch.Tensor:
    parts = input_TI.split(tokens_per_expert.tolist())
    return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weight_EOI.unbind(0))])
