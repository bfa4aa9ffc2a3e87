"""Weight gradients added where megatron keeps them.

megatron's DistributedDataParallel gives every parameter a view of its fp32 gradient buffer as ``main_grad`` and adds each
new gradient to it. A product that adds to its output saves the new tensor and the addition. A function that does so returns
no gradient for the weight; the hook of DistributedDataParallel adds only what it finds in ``.grad``, so both ways may meet
in one parameter. (``overlap_grad_reduce`` wants a gradient in every ``.grad``, and asserts it.)

A weight whose every gradient comes this way (``owns_buffer``) needs no zeros to begin with: the first product of a step
overwrites what is there. Between ``begin`` and ``finish`` its buffer is not to be read.
"""

import torch


def begin(parallel) -> None:
    """What DistributedDataParallel.zero_grad_buffer does, without filling the buffers that will be overwritten."""
    for weight in parallel.params_with_grad:
        weight.grad_added_to_main_grad = False
        weight.is_stale = getattr(weight, "owns_buffer", False) and adds_in_place(weight, weight)
        if not weight.is_stale:
            weight.main_grad.zero_()
    for group in parallel.bucket_groups + parallel.expert_parallel_bucket_groups:
        group.reset()


def finish(parallel) -> None:
    """Zeros for the weights that had no part in the step, before gradients are reduced."""
    for weight in parallel.params_with_grad:
        if take_stale(weight):
            weight.main_grad.zero_()


def take_stale(weight: torch.Tensor) -> bool:
    """True once after ``begin``: the next product is to overwrite the buffer instead of adding to it."""
    stale = getattr(weight, "is_stale", False)
    if stale:
        weight.is_stale = False
    return stale


def adds_in_place(weight: torch.Tensor, grad: torch.Tensor) -> bool:
    """True where the buffer and the products have one type: bf16 products into fp32 need a kernel that torch does not have."""
    total = getattr(weight, "main_grad", None)
    return total is not None and total.dtype == grad.dtype


def weight_gradient(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    """``left @ right``, the gradient of the matrix ``weight``; or None when it was added to ``weight.main_grad``."""
    if not adds_in_place(weight, left):
        return left @ right
    weight.main_grad.addmm_(left, right, beta=0 if take_stale(weight) else 1)
    return None
