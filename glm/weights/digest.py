"""One number for one tensor: equal exactly when type, shape and every byte are equal."""

import hashlib
from typing import Sequence

import torch
from torch import Tensor


def tensor_digest(tensor: Tensor) -> str:
    """Hex SHA-256 over data type, shape and bytes, the same on every device and for every memory layout."""
    digest = digest_start(tensor.dtype, tensor.shape)
    if tensor.numel():
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def digest_start(dtype: torch.dtype, shape: Sequence[int]):
    """The hash to which the tensor's bytes, row-major and in as many pieces as one likes, are still to be added."""
    return hashlib.sha256(f"{type_name(dtype)}{list(shape)}".encode())


def type_name(dtype: torch.dtype) -> str:
    """``float32``, ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
