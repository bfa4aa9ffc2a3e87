"""RMSNorm for megatron's layer specs, on any device."""

import torch
import torch.nn.functional as F


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, the mean in fp32, over the last dimension."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # finalize_model_grads sums it over TP
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.device.type == "cpu" and hidden.dtype == torch.float32:
            return _InFewPasses.apply(hidden, self.weight, self.eps)
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class _InFewPasses(torch.autograd.Function):
    """For float32 on a CPU, where torch has no kernel for it (a GPU has one) and its backward takes three times as many passes."""

    @staticmethod
    def forward(ctx, hidden, weight, eps):
        scale = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).square_().mul_(1 / hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (hidden * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        """With n = x * scale: dn = dy * w, dx = scale * (dn - n * mean(dn * n)), dw = sum(dy * n)."""
        hidden, weight, scale = ctx.saved_tensors
        normal = hidden * scale
        product = (grad * normal).flatten(0, -2)
        mean = torch.mv(product, weight).view(scale.shape).mul_(1 / hidden.shape[-1])
        grad_hidden = (grad * weight).sub_(normal.mul_(mean)).mul_(scale)
        return grad_hidden, product.sum(0), None
