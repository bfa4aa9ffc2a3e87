"""The dense part of a layer from transformer-engine (kernels.attention: te), through megatron's own providers.

Linear layers, norms and attention are upstream's; the experts and the gated activation stay ours. Norms stay modules of
their own: fused into the linear layer behind them (TELayerNormColumnParallelLinear) their parameters would change names, and
the name table, checkpoints and converters with them. Nothing here has run on a GPU yet.
"""

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from glm.errors import PlatformError
from glm.model.attention_logits import LogitWatch
from glm.model.documents import Documents
from glm.model.experts import StackedExperts
from glm.model.gated import SwiGLU


def te_backend():
    """megatron's TESpecProvider with our experts, activation and documents.

    Raises PlatformError when transformer-engine cannot be imported.
    """
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError) as problem:    # OSError: a CUDA library of another release
        raise PlatformError(
            "kernels.attention: te", f"transformer-engine cannot be imported ({problem})",
            "transformer-engine 2.9 to 2.11, built for the installed torch",
            "pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]>=2.9,<2.12' (requirements/cuda.txt), "
            "or set kernels.attention=sdpa in the hardware file: torch alone",
        ) from problem
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    class TEBackend(TESpecProvider):
        def fuse_layernorm_and_linear(self):
            return False

        def core_attention(self):
            return DocumentAttention

        def activation_func(self):
            return SwiGLU

        def grouped_mlp_modules(self, moe_use_grouped_gemm, moe_use_legacy_grouped_gemm):
            return StackedExperts, None

    return TEBackend()


class DocumentAttention(torch.nn.Module):
    """transformer-engine's attention for what megatron hands to ours: [S, B, N, D], and ``Documents`` beside it.

    Plain rows go through as they are, under context parallelism too: transformer-engine divides a row into the same pieces
    (glm.model.documents). A packed row becomes its "thd" form; under context parallelism the recipe refuses it.
    """

    def __init__(self, config, **arguments):
        super().__init__()
        self.inner = _attention(config, **arguments)
        self.scale = arguments.get("softmax_scale")
        groups = arguments.get("pg_collection")
        self.watch = None if groups and groups.cp.size() > 1 else LogitWatch()    # there a rank has only its part of the keys

    def forward(
        self, query, key, value, attention_mask=None, attn_mask_type=None, attention_bias=None,
        packed_seq_params: Documents | None = None,
    ) -> torch.Tensor:
        """Returns [S, B, N*D]."""
        if self.watch and self.watch.on:
            scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
            self.watch.see(query, key, scale, packed_seq_params, 0, 1)
        options = {"attn_mask_type": attn_mask_type, "attention_bias": attention_bias}
        if packed_seq_params is None or not packed_seq_params.packed:
            return self.inner(query, key, value, attention_mask, **options)
        row = (tensor.squeeze(1) for tensor in (query, key, value))
        out = self.inner(*row, attention_mask, packed_seq_params=as_thd(packed_seq_params, query.device), **options)
        return out.reshape(query.shape[0], 1, -1)


def _attention(config, **arguments) -> torch.nn.Module:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention(config, **arguments)


def as_thd(documents: Documents, device: torch.device) -> PackedSeqParams:
    """The bounds of a packed row's documents, int32 [documents + 1], as transformer-engine wants them."""
    if documents.cu_seqlens_q is None:    # once a batch, not once a layer
        bounds = torch.tensor([0, *documents.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        documents.cu_seqlens_q = documents.cu_seqlens_kv = bounds
        documents.max_seqlen_q = documents.max_seqlen_kv = max(documents.lengths)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=documents.cu_seqlens_q, cu_seqlens_kv=documents.cu_seqlens_kv,
        max_seqlen_q=documents.max_seqlen_q, max_seqlen_kv=documents.max_seqlen_kv,
    )
