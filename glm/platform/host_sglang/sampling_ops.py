"""Sampling in torch, in place of SGLang's Triton kernels.

    top_k_renorm, top_p_renorm   K/ops/sampling/renorm.py:38 leaves them None on an unknown platform
    row_argmax                   K/ops/speculative/row_argmax.py:134
    murmur_hash32                K/ops/sampling/murmur_hash.py:103 wants sgl_kernel for CPU tensors
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def top_k_renorm(probs: Tensor, top_ks: Tensor) -> Tensor:
    """probs [N, V] with all but the largest top_ks [N] set to zero, summing to one. Ties with the last are kept."""
    last = (top_ks.long().clamp(1, probs.shape[-1]) - 1)[:, None]
    threshold = probs.sort(-1, descending=True).values.gather(1, last)
    kept = torch.where(probs >= threshold, probs, 0)
    return kept / kept.sum(-1, keepdim=True)


def top_p_renorm(probs: Tensor, top_ps: Tensor) -> Tensor:
    """probs [N, V] cut to the smallest set of most likely tokens whose mass reaches top_ps [N], summing to one."""
    ordered, order = probs.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    ordered = torch.where(before > top_ps.view(-1, 1), 0, ordered)
    ordered = ordered / ordered.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, order, ordered)


def row_argmax(x: Tensor) -> Tensor:
    return x.argmax(-1)


def murmur_hash32(seed: Tensor, positions: Tensor, col_indices: Tensor) -> Tensor:
    """MurmurHash3 of (seed 64 bits, position, column) for seed [N], positions [N], col_indices [M]: uint32 [N, M].

    torch has no arithmetic on uint32, so this is int64 with masks; a product is split to stay below 2**63.
    """
    seed, positions = seed.view(torch.int64) if seed.dtype == torch.uint64 else seed.long(), positions.to(torch.int64)
    state = torch.zeros_like(seed)
    for word in (seed & _LOW, (seed >> 32) & _LOW, positions & _LOW):
        state = _mix(state, word)
    state = _mix(state[:, None], (col_indices.long() & _LOW)[None, :])
    state = state ^ 16
    state = _multiply(state ^ (state >> 16), 0x85EBCA6B)
    state = _multiply(state ^ (state >> 13), 0xC2B2AE35)
    return (state ^ (state >> 16)).to(torch.uint32)


def _mix(state: Tensor, word: Tensor) -> Tensor:
    word = _multiply(_rotate(_multiply(word, 0xCC9E2D51), 15), 0x1B873593)
    return (_rotate(state ^ word, 13) * 5 + 0xE6546B64) & _LOW


def _multiply(x: Tensor, factor: int) -> Tensor:
    return (x * (factor & 0xFFFF) + (((x * (factor >> 16)) & 0xFFFF) << 16)) & _LOW


def _rotate(x: Tensor, bits: int) -> Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _LOW
