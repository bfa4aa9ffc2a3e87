"""The host as a platform of SGLang: a CPU that is not SGLang's own CPU platform.

SGLang's own one (SGLANG_USE_CPU_ENGINE) needs sgl_kernel, which has no wheel here, and commits the argmax instead of a
sample when it verifies drafts (S/speculative/eagle_utils.py:500): wrong for reinforcement learning, and silent.
"""

import types

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

ATTENTION_BACKEND = "host_sdpa"


class HostPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU tensors, gloo, no Triton, no graphs."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def get_default_speculative_draft_attention_backend(self, algorithm: str) -> str:
        return ATTENTION_BACKEND

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm in ("EAGLE", "NEXTN")

    def supports_speculative_draft_attention_backend(self, algorithm: str, backend: str) -> bool:
        return backend == ATTENTION_BACKEND

    def is_pin_memory_available(self, device=None) -> bool:
        return False

    def get_kv_pool_cls(self, *, kind: str):
        if kind != "mha":
            return None
        from glm.platform.host_sglang.memory import HostKVPool

        return HostKVPool

    def get_speculative_cache_locs_fn(self):
        from glm.platform.host_sglang.speculative_ops import extend_cache_locations

        return extend_cache_locations

    def init_backend(self) -> None:
        """Called when S/model_executor/model_runner.py:271 is imported, after the hooks were applied: the first moment
        at which all seams can be checked, before any weight is read."""
        from glm.platform.host_sglang.hooks import fill_empty_slots, verify_seams

        fill_empty_slots()
        verify_seams()

    def post_load_model(self, model) -> None:
        """S/models/glm4_moe.py:1258 ends set_embed_and_head in bare torch.cuda calls; the draft model gets one without."""
        if hasattr(model, "set_embed_and_head"):
            model.set_embed_and_head = types.MethodType(_set_embed_and_head, model)


def _set_embed_and_head(model, embed, head) -> None:
    del model.model.embed_tokens.weight
    del model.lm_head.weight
    model.model.embed_tokens.weight = embed
    model.lm_head.weight = head
