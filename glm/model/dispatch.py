"""Tokens to experts and back on ranks that hold every expert whole: a sort, no communication.

Upstream's dispatchers do the same work for one rank as for many (masks, all-to-all among one, sums by scattering). Which one
a layer has is decided by the sizes of its groups.

Legend: T tokens of this rank, H hidden, E experts, K experts per token, P = T * K pairs of token and expert.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher


def use_local_dispatch(model: torch.nn.Module) -> None:
    """Gives the MoE layers of ``model`` a ``LocalDispatcher`` if all their experts are here and none drops a token.

    MoELayer takes its dispatcher from a list of names (moe_layer.py:205), and TransformerLayer knows MoELayer itself, no
    class derived from it (transformer_layer.py:352): so it is put in place after both are built.
    """
    for layer in model.modules():
        if not isinstance(layer, MoELayer):
            continue
        upstream = layer.token_dispatcher
        drops = layer.config.moe_expert_capacity_factor is not None
        if upstream.ep_size == upstream.tp_size == 1 and not drops and not layer.shared_expert_overlap:
            layer.token_dispatcher = LocalDispatcher(layer.config)


class LocalDispatcher(MoETokenDispatcher):
    """Every token goes to exactly K experts, all of them here."""

    def __init__(self, config):
        self.config = config

    def dispatch_preprocess(self, tokens, routing_map, probs):
        """[..., H], [T, E] bool, [T, E] -> [P, H] sorted by expert, and the weight [P] of each."""
        self.shape = tokens.shape
        experts_per_token = self.config.moe_router_topk
        place_TE = routing_map.t().flatten().cumsum(0).sub_(1).view(routing_map.shape[::-1]).t()    # among pairs sorted by expert
        pairs = torch.nonzero_static(routing_map, size=routing_map.shape[0] * experts_per_token)    # sorted by token
        token, expert = pairs.unbind(1)
        self.places_TK = place_TE[token, expert].view(-1, experts_per_token)
        self.token_P = torch.empty_like(token).index_copy_(0, self.places_TK.flatten(), token)
        self.tokens_per_expert = routing_map.sum(0)
        weight_P = probs[self.token_P, torch.empty_like(expert).index_copy_(0, self.places_TK.flatten(), expert)]
        return _Spread.apply(tokens.reshape(-1, tokens.shape[-1]), self.token_P, self.places_TK), weight_P

    def token_dispatch(self, hidden_states, probs):
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states, probs):
        return hidden_states, self.tokens_per_expert, probs

    def combine_preprocess(self, hidden_states):
        return hidden_states

    def token_combine(self, hidden_states):
        return hidden_states

    def combine_postprocess(self, hidden_states):
        """[P, H] -> [..., H]: the sum over the experts of a token."""
        return _Gather.apply(hidden_states, self.token_P, self.places_TK).view(self.shape)


class _Spread(torch.autograd.Function):
    """[T, H] -> [P, H]; backward sums a token's K copies."""

    @staticmethod
    def forward(ctx, tokens_TH, token_P, places_TK):
        ctx.save_for_backward(places_TK)
        return tokens_TH.index_select(0, token_P)

    @staticmethod
    def backward(ctx, grad_PH):
        return _sum_of_places(grad_PH, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    """[P, H] -> [T, H]: the sum of a token's K rows; backward copies."""

    @staticmethod
    def forward(ctx, rows_PH, token_P, places_TK):
        ctx.save_for_backward(token_P)
        return _sum_of_places(rows_PH, places_TK)

    @staticmethod
    def backward(ctx, grad_TH):
        return grad_TH.index_select(0, ctx.saved_tensors[0]), None, None


def _sum_of_places(rows_PH: torch.Tensor, places_TK: torch.Tensor) -> torch.Tensor:
    """[T, H] with K rows summed each, in the order of the experts on any device: a sum by scattering has none on a GPU."""
    return F.embedding_bag(places_TK, rows_PH, mode="sum")
