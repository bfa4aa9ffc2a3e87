"""megatron's top-k router with what is wrong in it put right: see each method."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter


class SigmoidRouter(TopKRouter):
    """Sigmoid scores, choice by score plus bias, weights from the unbiased scores."""

    trained_share: torch.Tensor | float = 1.0
    """Tokens of this step's global batch that are trained on, over all of them. Gradients are divided by the former, the balance
    loss counts the latter: without this factor its weight would grow with prompts, masks and padding."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight.data = self.weight.data.float()

    def _apply(self, function, recurse=True):
        """Keeps weight, bias and counts in fp32 when the model is cast.

        Float16Module casts every buffer; upstream puts back the type of the bias, not its value, and leaves the counts in
        bf16, where adding to more than 256 tokens an expert loses them.
        """
        kept = {name: getattr(self, name).data for name in ("weight", "expert_bias", "local_tokens_per_expert")}
        super()._apply(function, recurse)
        for name, exact in kept.items():
            moved = getattr(self, name)
            moved.data = exact.to(moved.device)
        return self

    def gating(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in fp32 whatever the model's precision.

        Upstream's router_gating_linear (moe_utils.py:1192) needs a name that exists only with transformer-engine.
        """
        return F.linear(hidden.float(), self.weight.float())

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None):
        """The weight of a token's only expert is the scaling factor: GLM-4.5 divides the chosen scores by their sum.

        Upstream does so for two experts a token or more (moe_utils.py:724); with one it would weigh by the bare score, as
        transformers and SGLang do not.
        """
        probs, routing_map = super().routing(logits, padding_mask)
        if self.topk == 1:
            # from the score, not a constant: the balance loss hangs on the graph of probs
            probs = probs / (probs.sum(-1, keepdim=True) + 1e-20) * self.config.moe_router_topk_scaling_factor
        return probs, routing_map

    def attach_and_log_load_balancing_loss(
        self, activation, aux_loss_coeff, aux_loss, aux_loss_name, reduce_group, reduce_group_has_dp=False,
        valid_token_count=None,
    ):
        """``activation`` unchanged; its backward also carries the balance loss, for the tokens of all rows and of the whole
        reduce group.

        Upstream multiplies by this rank's tokens (router.py:466), so the coefficient shrinks by TP x CP, and for the loss of a
        sequence by the tokens of one row only (moe_utils.py:231), so it shrinks by the rows of a micro-batch as well. It also
        adds the value to a table of the process, sized by the first model and read by nobody here.
        """
        tokens = activation.shape[0] * reduce_group.size() * self.trained_share
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * tokens)

    def _apply_expert_bias(self, routing_map, padding_mask=None):
        """Upstream's ``routing_map & ~padding_mask`` (router.py:542) is [T, E] & [T]."""
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask.unsqueeze(-1)
        super()._apply_expert_bias(routing_map)
