"""Core attention by torch's scaled_dot_product_attention: causal, grouped queries, inside documents, over context-parallel ranks.

Under context parallelism each rank keeps its queries and gathers keys and values of the whole row (8 heads of 128 in GLM-4.5:
a twelfth of the queries), as Llama 3 did; the gradient of what was gathered is summed back to its owner.

Legend: S sequence (of this rank), R the whole row, B batch, N query heads, G key/value heads, D head dimension.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from glm.model.attention_logits import LogitWatch
from glm.model.documents import DocumentGroup, Documents, Segment


class SDPAttention(torch.nn.Module):
    """megatron's core attention for [S, B, N, D]; ``Documents`` says what attends to what, whole causal rows without it."""

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, attention_dropout=None, softmax_scale=None,
        cp_comm_type=None, pg_collection=None,
    ):
        super().__init__()
        self.scale = softmax_scale
        self.cp_group = pg_collection.cp
        self.watch = LogitWatch()

    def forward(
        self, query, key, value, attention_mask=None, attn_mask_type=None, attention_bias=None,
        packed_seq_params: Documents | None = None,
    ) -> torch.Tensor:
        """Returns [S, B, N*D]."""
        S, B = query.shape[:2]
        if self.cp_group.size() > 1:
            assert packed_seq_params is not None, "under context parallelism a batch says which part of the row is here"
            key, value = _WholeRow.apply(torch.stack([key, value]), packed_seq_params.order, self.cp_group).unbind(0)
        if self.watch.on:
            scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
            self.watch.see(query, key, scale, packed_seq_params, self.cp_group.rank(), self.cp_group.size())
        # the rows of a sequence side by side: torch's kernel on a CPU loses half of its speed on strides of a whole batch
        query, key, value = (tensor.transpose(0, 1).contiguous().transpose(1, 2) for tensor in (query, key, value))
        if packed_seq_params is None:
            out = self._causal(query, key, value)
        else:
            out = self._in_documents(query, key, value, packed_seq_params)
        return out.permute(2, 0, 1, 3).reshape(S, B, -1)

    def _in_documents(self, query_BNSD, key_BGRD, value_BGRD, documents: Documents) -> torch.Tensor:
        segments, groups = documents.segments, documents.groups
        if len(segments) == 1 and not groups:
            return self._segment(query_BNSD, key_BGRD, value_BGRD, segments[0])
        results = [self._segment(query_BNSD, key_BGRD, value_BGRD, segment) for segment in segments]
        results += [self._group(query_BNSD, key_BGRD, value_BGRD, group) for group in groups]
        return torch.cat(results, dim=2).index_select(2, documents.results)

    def _segment(self, query_BNSD, key_BGRD, value_BGRD, segment: Segment) -> torch.Tensor:
        """[B, N, queries of the segment, D]."""
        return self._causal(
            query_BNSD[:, :, segment.queries], key_BGRD[:, :, segment.keys], value_BGRD[:, :, segment.keys],
        )

    def _group(self, query_1NSD, key_1GRD, value_1GRD, group: DocumentGroup) -> torch.Tensor:
        """[1, N, real tokens of the group, D]; each document of the group is a batch entry of its own."""
        def documents(tensor_1HSD, places):
            return tensor_1HSD[0].index_select(1, places.reshape(-1)).unflatten(1, places.shape).transpose(0, 1)

        out = self._causal(
            documents(query_1NSD, group.queries), documents(key_1GRD, group.keys), documents(value_1GRD, group.keys),
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, group.filled).transpose(0, 1)[None]

    def _causal(self, query, key, value) -> torch.Tensor:
        """The last query sees every key; with fewer queries than keys the first ones stand further down the diagonal."""
        queries, keys = query.shape[-2], key.shape[-2]
        same = queries == keys
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=None if same else causal_lower_right(queries, keys), is_causal=same, scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )


class _WholeRow(torch.autograd.Function):
    """[2, S, ...] of each context-parallel rank to [2, R, ...] in the order of the row; backward sums over the ranks."""

    @staticmethod
    def forward(ctx, part, order, group):
        gathered = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
        dist.all_gather_into_tensor(gathered, part.contiguous(), group=group)
        ctx.order, ctx.group = order, group
        return gathered.unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(1, 2).index_select(1, order)

    @staticmethod
    def backward(ctx, gradient):
        size = ctx.group.size()
        by_rank = gradient.index_select(1, ctx.order.argsort()).unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1)
        own = by_rank.new_empty(by_rank.shape[0] // size, *by_rank.shape[1:])
        dist.reduce_scatter_tensor(own, by_rank, group=ctx.group)
        return own, None, None
