"""Cross entropy of the output head where the vocabulary is not divided: one buffer as large as the logits instead of four.

Legend: N tokens, H hidden, V vocabulary.
"""

import torch
import torch.distributed as dist

from glm.model.gradients import weight_gradient

CHUNK = 1 << 25
"""Logits in float32 at a time; the head of a large vocabulary is worked on in pieces of rows."""


def token_losses(hidden: torch.Tensor, weight_VH: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """float32 cross entropy of ``hidden`` [..., H] @ weight^T / temperature against ``labels`` [...]."""
    return token_losses_and_hits(hidden, weight_VH, labels, temperature)[0]


def token_losses_and_hits(
    hidden: torch.Tensor, weight_VH: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``token_losses``, and bool [...]: whether no logit is larger than the label's, which comes with the losses for nothing."""
    losses, hits = _TokenLosses.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight_VH, labels.reshape(-1), temperature, torch.is_grad_enabled(),
    )
    return losses.view(labels.shape), hits.view(labels.shape)


def label_is_largest(logits_SBV: torch.Tensor, labels_BS: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """bool [B, S]: whether the label's logit is the largest, of logits divided over the ranks of ``group`` along the vocabulary."""
    own, place = logits_SBV.detach().max(dim=-1)
    largest = own.float().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    hits = (own == largest) & (place + group.rank() * logits_SBV.shape[-1] == labels_BS.t())
    found = hits.float()
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return found.t() > 0


class _TokenLosses(torch.autograd.Function):
    """Saves d loss / d logits (probabilities less one at the label), so that backward is two products."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, labels_N, temperature, differentiable):
        N, V = hidden_NH.shape[0], weight_VH.shape[0]
        slope_NV = hidden_NH.new_empty(N, V) if differentiable else None
        losses_N = hidden_NH.new_empty(N, dtype=torch.float32)
        hits_N = hidden_NH.new_empty(N, dtype=torch.bool)
        rows = max(1, CHUNK // V)
        for first in range(0, N, rows):
            part = slice(first, first + rows)
            direct = differentiable and slope_NV.dtype == torch.float32
            logits = torch.mm(hidden_NH[part], weight_VH.t(), out=slope_NV[part] if direct else None).float()
            if temperature != 1.0:
                logits.div_(temperature)
            labels = labels_N[part].unsqueeze(1)
            logits.sub_(logits.amax(1, keepdim=True))
            chosen = logits.gather(1, labels)
            hits_N[part] = chosen.squeeze(1) == 0    # the largest was subtracted
            total = logits.exp_().sum(1, keepdim=True)
            losses_N[part] = (total.log() - chosen).squeeze(1)
            if differentiable:
                logits.div_(total)
                logits.scatter_(1, labels, logits.gather(1, labels) - 1)
                if not direct:
                    slope_NV[part] = logits
        if differentiable:
            ctx.save_for_backward(hidden_NH, slope_NV, weight_VH)
            ctx.temperature = temperature
        ctx.mark_non_differentiable(hits_N)
        return losses_N, hits_N

    @staticmethod
    def backward(ctx, grad_N, _):
        hidden_NH, slope_NV, weight_VH = ctx.saved_tensors
        scale = (grad_N / ctx.temperature).unsqueeze(1)    # stays fp32: rounded to bf16, one over the tokens would be off alike for all
        grad_hidden = (slope_NV @ weight_VH).mul_(scale) if ctx.needs_input_grad[0] else None
        grad_weight = weight_gradient(weight_VH, slope_NV.t(), (hidden_NH * scale).to(hidden_NH.dtype)) if ctx.needs_input_grad[1] else None
        return grad_hidden, grad_weight, None, None, None
