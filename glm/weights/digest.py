"""One number for one tensor: equal exactly when type, shape and every byte are equal."""

import hashlib

import torch
from torch import Tensor


def tensor_digest(tensor: Tensor) -> str:
    """Hex SHA-256 over data type, shape and bytes, the same on every device and for every memory layout."""
    digest = hashlib.sha256(f"{type_name(tensor.dtype)}{list(tensor.shape)}".encode())
    if tensor.numel():
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def type_name(dtype: torch.dtype) -> str:
    """``float32``, ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
