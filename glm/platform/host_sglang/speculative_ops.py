"""Chain speculative decoding (EAGLE with one candidate a position) in torch, in place of SGLang's Triton kernels.

Every function has the name of its arguments from the kernel it stands in for, because SGLang passes them by name; those
marked mutable are written in place. B requests, D = draft tokens + 1 slots a request (the first is the last committed
token), V vocabulary. All tensors are on the CPU. This file imports torch only, so it can be tested without a server.

    assign_req_to_token_pool          S/mem_cache/allocation.py:737
    assign_draft_cache_locs           K/ops/speculative/cache_locs.py:85
    extend_cache_locations            K/ops/speculative/cache_locs.py:679 (through the platform interface)
    build_chain                       K/ops/speculative/spec_tree.py:367
    verify_greedy                     K/ops/speculative/spec_tree.py:480
    fill_bonus_tokens                 K/ops/speculative/eagle.py:32
    verify_by_rejection               K/ops/speculative/reject_sampling.py:242
"""

import torch
from torch import Tensor


def assign_req_to_token_pool(req_pool_indices: Tensor, req_to_token: Tensor, start_offset: Tensor, end_offset: Tensor,
                             out_cache_loc: Tensor, batch_size: int) -> None:
    """Writes each request's new memory slots into columns [start, end) of its row of the table (mutable)."""
    counts = (end_offset - start_offset).long()
    rows = torch.repeat_interleave(req_pool_indices.long(), counts)
    first = torch.repeat_interleave(start_offset.long() - (counts.cumsum(0) - counts), counts)
    columns = torch.arange(rows.numel()) + first
    req_to_token[rows, columns] = out_cache_loc[: rows.numel()].to(req_to_token.dtype)


def assign_draft_cache_locs(req_pool_indices: Tensor, req_to_token: Tensor, seq_lens: Tensor, out_cache_loc: Tensor,
                            topk: int, num_cols: int, positions: Tensor | None = None, mrope: Tensor | None = None) -> None:
    """Copies the slots behind each sequence into out_cache_loc (mutable), and the draft positions where asked."""
    assert topk == 1 and mrope is None, "the host platform drafts chains of text"
    columns = seq_lens.long()[:, None] + torch.arange(num_cols)
    out_cache_loc.copy_(req_to_token[req_pool_indices.long()[:, None], columns].reshape(-1))
    if positions is not None:
        positions.copy_(seq_lens)


def extend_cache_locations(*, req_pool_indices: Tensor, req_to_token: Tensor, start_offset: Tensor, draft_token_num: int,
                           **unused) -> Tensor:
    """[B * D] slots of the D tokens behind each start."""
    columns = start_offset.long()[:, None] + torch.arange(draft_token_num)
    return req_to_token[req_pool_indices.long()[:, None], columns].reshape(-1).long()


def build_chain(parent_list, top_scores_index, seq_lens: Tensor, tree_mask, positions: Tensor, retrieve_index: Tensor,
                retrieve_next_token: Tensor, retrieve_next_sibling: Tensor, topk: int, spec_steps: int,
                num_verify_tokens: int, tree_mask_mode) -> None:
    """A tree in which slot i is followed by slot i + 1. The mask stays untouched: the attention knows it is a chain."""
    assert topk == 1 and num_verify_tokens == spec_steps + 1, "the host platform verifies chains only"
    slots = torch.arange(num_verify_tokens)
    positions.copy_((seq_lens.long()[:, None] + slots).reshape(-1))
    retrieve_index.copy_(torch.arange(retrieve_index.numel()).view_as(retrieve_index))
    following = slots + 1
    following[-1] = -1
    retrieve_next_token.copy_(following.expand_as(retrieve_next_token))
    retrieve_next_sibling.fill_(-1)


def verify_greedy(predicts: Tensor, accept_index: Tensor, accept_token_num: Tensor, candidates: Tensor, retrieve_index,
                  retrieve_next_token, retrieve_next_sibling, target_predict: Tensor, topk: int = -1):
    """Accepts drafts while they equal the target's argmax [B, D]; the first that does not is replaced by it."""
    accepted = (candidates[:, 1:] == target_predict[:, :-1]).long().cumprod(1).sum(1)
    final = target_predict.gather(1, accepted[:, None])[:, 0]
    _commit(predicts, accept_index, accept_token_num, candidates, accepted, final)
    return predicts, accept_index, accept_token_num


def fill_bonus_tokens(accept_tokens: Tensor, accept_lens: Tensor, bonus_tokens: Tensor, accept_stride: int,
                      batch_size: int) -> None:
    """The last accepted token of each request, from rows of accept_stride tokens."""
    last = torch.arange(batch_size) * accept_stride + accept_lens.long() - 1
    bonus_tokens.copy_(accept_tokens.reshape(-1)[last])


def verify_by_rejection(predicts: Tensor, accept_index: Tensor, accept_token_num: Tensor, candidates: Tensor,
                        retrive_index, retrive_next_token, retrive_next_sibling, uniform_samples: Tensor,
                        uniform_samples_for_final_sampling: Tensor, target_probs: Tensor, draft_probs: Tensor,
                        threshold_single, threshold_acc, deterministic, *, block_verification: bool = False) -> None:
    """Speculative sampling (arXiv 2211.17192 algorithm 1): the committed tokens follow the target's distribution.

    target_probs [B, D, V], draft_probs [B, D - 1 or D, V]: rows after slot i. uniform_samples [B, D] in [0, 1).
    """
    assert not block_verification, "the host platform verifies token by token"
    accepted, final = rejection_sample(candidates, uniform_samples, uniform_samples_for_final_sampling, target_probs, draft_probs)
    _commit(predicts, accept_index, accept_token_num, candidates, accepted, final)


def rejection_sample(candidates: Tensor, coins: Tensor, final_coins: Tensor, target_probs: Tensor,
                     draft_probs: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafts each request keeps [B], and the token that follows them [B]. Pure.

    A draft x from q is kept with probability min(1, p(x) / q(x)); the first that is not is replaced by a sample of
    max(0, p - q); if all are kept, one more is sampled from p.
    """
    rows, slots = torch.arange(candidates.shape[0]), candidates.shape[1]
    drafts = candidates[:, 1:, None].long()
    p = target_probs[:, :-1].gather(2, drafts)[..., 0]
    q = draft_probs[:, : slots - 1].gather(2, drafts)[..., 0]
    keep = (q > 0) & (coins[:, : slots - 1] * q < p)
    accepted = keep.long().cumprod(1).sum(1)
    target = target_probs[rows, accepted]
    draft = draft_probs[rows, accepted.clamp_max(slots - 2)]
    residual = torch.where((accepted < slots - 1)[:, None], (target - draft).clamp_min(0), target)
    return accepted, _sample(residual, final_coins)


def _sample(weights_BV: Tensor, coins_B: Tensor) -> Tensor:
    """One token a row by inverting the cumulative sum; the weights need not sum to one."""
    cumulative = weights_BV.double().cumsum(-1)
    token = torch.searchsorted(cumulative, coins_B.double()[:, None] * cumulative[:, -1:], right=True)[:, 0]
    # a row without weight (p == q up to rounding) has no sample: its largest entry
    return torch.where(token < weights_BV.shape[1], token, weights_BV.argmax(-1))


def _commit(predicts: Tensor, accept_index: Tensor, accept_token_num: Tensor, candidates: Tensor, accepted: Tensor,
            final: Tensor) -> None:
    """Writes the outcome as SGLang reads it: predicts [B * D] is the token behind each slot, accept_index [B, depth] the
    kept slots (-1 behind them), accept_token_num [B] how many drafts were kept."""
    batch, width = candidates.shape
    slots = torch.arange(width)
    kept = slots <= accepted[:, None]
    following = torch.cat([candidates[:, 1:], candidates[:, :1]], 1)
    following = torch.where(slots == accepted[:, None], final[:, None].to(following.dtype), following)
    predicts.copy_((following * kept).reshape(-1))
    index = torch.where(kept, torch.arange(batch * width).view(batch, width), -1)
    accept_index.copy_(index[:, : accept_index.shape[1]])
    accept_token_num.copy_(accepted)
