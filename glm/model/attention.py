"""Core attention by torch's scaled_dot_product_attention: causal, grouped queries, inside documents.

Legend: S sequence, B batch, T packed tokens, N query heads, G key/value heads, D head dimension.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass(frozen=True)
class DocumentGroup:
    """Documents of similar length that share one attention call.

    ``rows``: int64 [documents, longest], indices into the pack (padding repeats the last token, whose causal mask never
    reaches a real query). ``real``: bool of the same shape.
    """

    rows: torch.Tensor
    real: torch.Tensor
    tokens: torch.Tensor
    """int64 [real tokens]: where the results go in the pack."""


def document_groups(lengths: list[int]) -> list[DocumentGroup]:
    """Groups documents so that no more than about half of a group is padding: one group a power of two."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    buckets: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        if length:
            buckets.setdefault(length.bit_length(), []).append(index)
    groups = []
    for members in buckets.values():
        sizes = torch.tensor([lengths[index] for index in members])[:, None]
        first = torch.tensor([starts[index] for index in members])[:, None]
        column = torch.arange(int(sizes.max()))[None, :]
        rows = first + torch.minimum(column, sizes - 1)
        real = column < sizes
        groups.append(DocumentGroup(rows, real, rows[real]))
    return groups


def pack_params(lengths: list[int], device: torch.device) -> PackedSeqParams:
    """What megatron wants to know of a pack of documents, with our attention's groups attached."""
    bounds = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(device=device, dtype=torch.int32)
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths),
    )
    params.groups = [
        DocumentGroup(group.rows.to(device), group.real.to(device), group.tokens.to(device))
        for group in document_groups(lengths)
    ]
    return params


class SDPAttention(torch.nn.Module):
    """megatron's core attention: [S, B, N, D] causal, or packed documents [T, N, D]."""

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, attention_dropout=None, softmax_scale=None,
        cp_comm_type=None, pg_collection=None,
    ):
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self, query, key, value, attention_mask=None, attn_mask_type=None, attention_bias=None, packed_seq_params=None,
    ) -> torch.Tensor:
        """Returns [S, B, N*D], or [T, N*D] for a pack."""
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params.groups)
        S, B = query.shape[:2]
        out = self._causal(*(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)))
        return out.permute(2, 0, 1, 3).reshape(S, B, -1)

    def _packed(self, query, key, value, groups: list[DocumentGroup]) -> torch.Tensor:
        T = query.shape[0]
        results = []
        for group in groups:
            shape = group.rows.shape
            rows = group.rows.reshape(-1)
            padded = (tensor.index_select(0, rows).unflatten(0, shape).transpose(1, 2) for tensor in (query, key, value))
            results.append(self._causal(*padded).transpose(1, 2)[group.real])
        order = torch.cat([group.tokens for group in groups]).argsort()
        return torch.cat(results).index_select(0, order).reshape(T, -1)

    def _causal(self, query_BNSD, key_BGSD, value_BGSD) -> torch.Tensor:
        grouped = query_BNSD.shape[1] != key_BGSD.shape[1]
        return F.scaled_dot_product_attention(
            query_BNSD, key_BGSD, value_BGSD, is_causal=True, scale=self.scale, enable_gqa=grouped,
        )
