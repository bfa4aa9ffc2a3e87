"""Attention of the host platform: requests are padded into one scaled-dot-product attention a layer.

SGLang's own torch_native backend (S/layers/attention/torch_native_backend.py) loops over the requests and has no
draft or verify mode. One padded call is 2.5 times as fast at 128 requests.

Shapes: T query rows of all requests, B requests of a group, Q query rows and K keys a request (padded), H query heads,
G key/value heads, D head size. A query row sees the keys at its own and earlier positions of its own request. Keys are
read through the table req_to_token [request slot, position] -> row of the key/value memory.
"""

import os
from dataclasses import dataclass

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from glm.platform.host_sglang.environment import BATCH_INVARIANT
from glm.platform.host_sglang.grouping import group_requests


@dataclass(frozen=True)
class Group:
    """Requests that share one call."""

    batch: int
    queries: int
    keys: int
    rows: Tensor | None
    """[B * Q] query row of each place, or None when the rows are all there and in order."""
    valid: Tensor | None
    """[B, Q] which places hold a query, or None when all do."""
    mask_B1QK: Tensor
    slots_BK: Tensor


class HostAttention(AttentionBackend):
    """One forward of the target (draft_step None), or step draft_step of a chain of drafts."""

    needs_cpu_seq_lens = True

    def __init__(self, runner, draft_step: int | None = None):
        super().__init__()
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.pool = runner.token_to_kv_pool
        self.device = runner.device
        self.max_context_len = runner.model_config.context_len
        self.draft_step = draft_step
        self.invariant = os.environ.get(BATCH_INVARIANT) == "1"
        self.groups: list[Group] = []

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_forward_metadata(self, forward_batch) -> None:
        """Once a forward, before its layers: which keys every query row sees."""
        mode = forward_batch.forward_mode
        if mode.is_idle():
            self.groups = []
            return
        lengths = forward_batch.seq_lens.long()
        if self.draft_step is not None:  # the committed tokens and the drafts so far
            keys, queries = lengths + self.draft_step + 1, torch.ones_like(lengths)
        elif mode.is_decode():
            keys, queries = lengths, torch.ones_like(lengths)
        elif mode.is_target_verify():  # seq_lens does not count the slots to be verified
            drafts = forward_batch.spec_info.draft_token_num
            keys, queries = lengths + drafts, torch.full_like(lengths, drafts)
        else:  # prefill, and the draft's pass over what was accepted
            keys, queries = lengths, torch.as_tensor(forward_batch.extend_seq_lens).long()
        self.groups = self._plan(forward_batch.req_pool_indices.long(), keys, queries)

    def _plan(self, requests: Tensor, keys: Tensor, queries: Tensor) -> list[Group]:
        first_row = queries.cumsum(0) - queries
        planned = group_requests(queries.tolist(), keys.tolist(), self.invariant)
        groups = []
        for num_queries, num_keys, members in planned:
            whole = len(planned) == 1
            pick = slice(None) if whole else torch.tensor(members)
            k, q, first = keys[pick, None], queries[pick, None], first_row[pick, None]
            query, key = torch.arange(num_queries), torch.arange(num_keys)
            position = k - q + query
            mask = key <= position[:, :, None]  # padding queries get a later position: never an empty row
            slots = self.req_to_token[requests[pick, None], key.clamp_max(self.req_to_token.shape[1] - 1)].long()
            slots.masked_fill_(key >= k, 0)  # slot 0 is SGLang's dummy row
            valid = None if len(members) * num_queries == int(q.sum()) else query < q
            rows = None if whole and valid is None else (first + query)
            if rows is not None:
                rows = rows.clamp_max(int(queries.sum()) - 1).reshape(-1)
            groups.append(Group(len(members), num_queries, num_keys, rows, valid, mask[:, None], slots))
        return groups

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **unused) -> Tensor:
        """q [T, H * D], k and v [T, G * D] or None -> [T, H * D]. Writes k and v into the memory first."""
        if save_kv_cache and k is not None:
            self.pool.set_kv_buffer(
                layer,
                KVWriteLoc(forward_batch.out_cache_loc, None),
                k.view(-1, layer.tp_k_head_num, layer.qk_head_dim),
                v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
            )
        keys, values = self.pool.get_key_buffer(layer.layer_id), self.pool.get_value_buffer(layer.layer_id)
        q_THD = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out_THD = None
        for group in self.groups:
            result = _attend(q_THD if group.rows is None else q_THD[group.rows], keys, values, group, layer.scaling)
            if group.rows is None:
                out_THD = result
                break
            if out_THD is None:
                out_THD = q_THD.new_zeros(q_THD.shape[0], q_THD.shape[1], layer.v_head_dim)
            if group.valid is None:
                out_THD[group.rows] = result
            else:
                valid = group.valid.reshape(-1)
                out_THD[group.rows[valid]] = result[valid]
        return out_THD.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)

    forward_decode = forward_extend


def _attend(q_THD: Tensor, keys: Tensor, values: Tensor, group: Group, scale: float) -> Tensor:
    """[B * Q, H, D] of one group. The query heads that share a key head become rows of one matrix product."""
    B, Q, K, H, G = group.batch, group.queries, group.keys, q_THD.shape[1], keys.shape[1]
    share = H // G
    q = q_THD.view(B, Q, G, share, -1).permute(0, 2, 3, 1, 4).reshape(B, G, share * Q, -1)
    k, v = keys[group.slots_BK].transpose(1, 2), values[group.slots_BK].transpose(1, 2)
    mask = group.mask_B1QK[:, :, None].expand(B, 1, share, Q, K).reshape(B, 1, share * Q, K)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.view(B, G, share, Q, -1).permute(0, 3, 1, 2, 4).reshape(B * Q, H, -1)


class HostDraftAttention:
    """What EAGLE asks for instead of one backend: one for each draft step but the last (S/speculative/draft_utils.py:96)."""

    needs_cpu_seq_lens = True

    def __init__(self, runner, topk: int, num_steps: int):
        assert topk == 1, "the host platform drafts chains only"
        self.topk, self.speculative_num_steps = topk, num_steps
        self.attn_backends = [HostAttention(runner, step) for step in range(num_steps - 1)]
        self.max_context_len, self.device = runner.model_config.context_len, runner.device

    def init_forward_metadata(self, forward_batch) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)
