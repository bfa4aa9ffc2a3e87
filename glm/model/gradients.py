"""Weight gradients added where megatron keeps them.

megatron's DistributedDataParallel gives every parameter a view of its fp32 gradient buffer as ``main_grad`` and adds each
new gradient to it. A product that adds to its output saves the new tensor and the addition. A function that does so returns
no gradient for the weight; the hook of DistributedDataParallel adds only what it finds in ``.grad``, so both ways may meet
in one parameter. (``overlap_grad_reduce`` wants a gradient in every ``.grad``, and asserts it.)
"""

import torch


def adds_in_place(weight: torch.Tensor, grad: torch.Tensor) -> bool:
    """True where the buffer and the products have one type: bf16 products into fp32 need a kernel that torch does not have."""
    total = getattr(weight, "main_grad", None)
    return total is not None and total.dtype == grad.dtype


def weight_gradient(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    """``left @ right``, the gradient of the matrix ``weight``; or None when it was added to ``weight.main_grad``."""
    if not adds_in_place(weight, left):
        return left @ right
    weight.main_grad.addmm_(left, right)
    return None
