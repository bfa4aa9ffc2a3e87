"""The gated activation of GLM-4.5's feed-forwards, silu(gate) * up, with what its backward pass can recompute left out.

Legend: F inner width; T rows.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule


class _SwiGLU(torch.autograd.Function):
    """[..., 2F] -> [..., F]. Saves the input only."""

    @staticmethod
    def forward(ctx, both):
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        return swiglu_backward(grad, both, F.silu(gate))


def swiglu_backward(grad: torch.Tensor, both: torch.Tensor, activated: torch.Tensor) -> torch.Tensor:
    """Gradient of [..., 2F] ``both`` from that of the product; ``activated`` is silu(gate)."""
    gate, up = both.chunk(2, dim=-1)
    grad_both = torch.empty_like(both)
    grad_gate, grad_up = grad_both.chunk(2, dim=-1)
    torch.mul(grad, activated, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return grad_both


class SwiGLU(MegatronModule):
    """silu(gate) * up as megatron's MLP takes an activation from a layer spec (config.use_te_activation_func)."""

    def __init__(self, config):
        super().__init__(config=config)

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        return _SwiGLU.apply(both)
