"""Key/value memory without the Triton copy kernel."""

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool


class HostKVPool(MHATokenToKVPool):
    """S/mem_cache/memory_pool.py:2307 warms up a Triton kernel for moving slots (K/ops/kvcache/cache_move.py:199)."""

    def _init_kv_copy_and_warmup(self) -> None:
        self._kv_copy_config = None

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        for buffer in (*self.k_buffer, *self.v_buffer):
            buffer[tgt_loc] = buffer[src_loc]
