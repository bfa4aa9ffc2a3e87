"""Layer specs: which module stands at which place of a GLM-4.5 layer."""

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec_for_backend, get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer, TransformerLayerSubmodules, get_transformer_layer_offset,
)
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

from glm.model.attention import SDPAttention
from glm.model.experts import StackedExperts
from glm.model.gated import SwiGLU
from glm.model.linear import ColumnLinear, RowLinear
from glm.model.mtp import ShiftedMTPLayer
from glm.model.norm import RMSNorm
from glm.model.router import SigmoidRouter
from glm.model.te_backend import te_backend


class TorchBackend(LocalSpecProvider):
    """Modules that need nothing but torch: the same on a CPU and on a GPU without transformer-engine."""

    def layer_norm(self, rms_norm=False, for_qk=False):
        return RMSNorm

    def core_attention(self):
        return SDPAttention

    def column_parallel_linear(self):
        return ColumnLinear

    def row_parallel_linear(self):
        return RowLinear

    def activation_func(self):
        return SwiGLU

    def grouped_mlp_modules(self, moe_use_grouped_gemm, moe_use_legacy_grouped_gemm):
        return StackedExperts, None


def _layer(backend, config, moe: bool) -> ModuleSpec:
    norm = backend.layer_norm()
    head_norm = backend.layer_norm(for_qk=True) if config.qk_layernorm else IdentityOp
    feed_forward = get_mlp_module_spec_for_backend(
        backend, num_experts=config.num_moe_experts if moe else None, use_te_activation_func=True,
    )
    if moe:
        feed_forward.submodules.router = SigmoidRouter
    attention = SelfAttentionSubmodules(
        linear_qkv=backend.column_parallel_linear(),
        core_attention=backend.core_attention(),
        linear_proj=backend.row_parallel_linear(),
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention,
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=feed_forward,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def backend_of(attention: str):
    """The modules of the recipe's kernels.attention, sdpa or te. Raises PlatformError when transformer-engine is not there."""
    return te_backend() if attention == "te" else TorchBackend()


def decoder_spec(config, attention: str, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers this pipeline rank holds."""
    backend = backend_of(attention)
    dense, moe = _layer(backend, config, moe=False), _layer(backend, config, moe=True)
    layers = [moe if is_moe else dense for is_moe in config.moe_layer_freq]
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers[first:first + count], layer_norm=backend.layer_norm())


def mtp_spec(config, attention: str, vp_stage: int | None = None):
    """The MTP block, whose layer is a MoE layer like the decoder's last; None on a chunk without one."""
    if not config.mtp_num_layers:
        return None
    backend = backend_of(attention)
    layer = _layer(backend, config, moe=True)    # a chunk may hold no decoder layer to take it from
    spec = get_gpt_mtp_block_spec_for_backend(config, layer, backend, vp_stage=vp_stage)
    if spec is not None:
        for mtp_layer in spec.layer_specs:
            mtp_layer.module = ShiftedMTPLayer
    return spec
