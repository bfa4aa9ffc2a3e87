"""megatron's linear layers, with the weight gradient added in place where a layer is not divided.

Legend: T tokens, I input, O output width.
"""

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from glm.model.gradients import weight_gradient


class _Linear(torch.autograd.Function):
    """input [T, I] @ weight [O, I]^T + bias [O]."""

    @staticmethod
    def forward(ctx, input_TI, weight_OI, bias_O):
        ctx.save_for_backward(input_TI, weight_OI)
        ctx.has_bias = bias_O is not None
        return torch.mm(input_TI, weight_OI.t()) if bias_O is None else torch.addmm(bias_O, input_TI, weight_OI.t())

    @staticmethod
    def backward(ctx, grad_TO):
        input_TI, weight_OI = ctx.saved_tensors
        grad_input = grad_TO @ weight_OI if ctx.needs_input_grad[0] else None
        grad_weight = weight_gradient(weight_OI, grad_TO.t(), input_TI) if ctx.needs_input_grad[1] else None
        return grad_input, grad_weight, grad_TO.sum(0) if ctx.has_bias else None


class _Undivided:
    """Takes over ``_forward_impl`` (tensor_parallel/layers.py:948, 1239) where it has nothing to communicate or to defer."""

    def _forward_impl(
        self, input, weight, bias, gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel, grad_output_buffer=None, **rest,
    ):
        if gradient_accumulation_fusion or allreduce_dgrad or sequence_parallel or grad_output_buffer is not None:
            return super()._forward_impl(
                input=input, weight=weight, bias=bias, gradient_accumulation_fusion=gradient_accumulation_fusion,
                allreduce_dgrad=allreduce_dgrad, sequence_parallel=sequence_parallel, grad_output_buffer=grad_output_buffer, **rest,
            )
        return _Linear.apply(input.flatten(0, -2), weight, bias).unflatten(0, input.shape[:-1])


def _mark(linear) -> None:
    """All gradients of the weight come from ``_Linear`` unless upstream's function is taken, which depends on the layout alone."""
    config = linear.config
    linear.weight.owns_buffer = config.tensor_model_parallel_size == 1 and not config.gradient_accumulation_fusion


class ColumnLinear(_Undivided, ColumnParallelLinear):
    """ColumnParallelLinear."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _mark(self)


class RowLinear(_Undivided, RowParallelLinear):
    """RowParallelLinear."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _mark(self)
