"""The recipe's model section as megatron's TransformerConfig; every field is set on purpose."""

import dataclasses
from difflib import get_close_matches

import torch
import torch.nn.functional as F

from glm.errors import RecipeError
from glm.platform import active
from glm.recipe.schema import ModelStageRecipe
from glm.recipe.sections import Layout, Model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

RECOMPUTE = {
    "none": {"recompute_granularity": None},
    # The feed-forward keeps most (copies of each token for its experts) and costs least to repeat; attention, whose cost grows
    # with the length and which keeps little, runs once.
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
"""The recipe's ``recompute`` as megatron's fields."""


def transformer_config(
    model: Model,
    *,
    params: str = "fp32",
    layout: Layout = Layout(),
    recompute: str = "none",
    sequence_balance_weight: float = 0.0,
    adds_gradients: bool = False,
    upstream: dict[str, object] | None = None,
):
    """TransformerConfig of GLM-4.5 in the shape of ``model``.

    ``adds_gradients``: the platform's. ``upstream`` (recipe section ``megatron:``) sets further fields; a key that does not exist or that the recipe owns
    raises RecipeError.
    """
    from megatron.core.transformer import TransformerConfig

    dtype = DTYPES[params]
    fields = dict(
        # Shape (report, Table 1)
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.dense_ffn_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        qk_layernorm=model.qk_norm,
        add_qkv_bias=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=model.init_std,
        mtp_num_layers=model.num_mtp_layers or None,
        mtp_loss_scaling_factor=0.0,  # the weight of a step comes from its plan
        # Experts: sigmoid scores, choice by score + bias, renormalised, scaled; one shared expert
        num_moe_experts=model.num_experts,
        moe_layer_freq=[0] * model.num_dense_layers + [1] * (model.num_layers - model.num_dense_layers),
        moe_ffn_hidden_size=model.expert_ffn_size,
        moe_shared_expert_intermediate_size=(model.num_shared_experts * model.expert_ffn_size) or None,
        moe_router_topk=model.experts_per_token,
        moe_router_score_function="sigmoid",
        moe_router_pre_softmax=False,
        moe_router_topk_scaling_factor=model.routed_scaling_factor,
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.0,  # the rate of a step comes from its plan
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=sequence_balance_weight,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=False,
        # Sums over tokens are divided by the tokens of the whole global batch (megatron's default divides per rank)
        calculate_per_token_loss=True,
        # Precision
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        attention_softmax_in_fp32=True,
        perform_initialization=False,  # glm.model.initialize: the same weights under every layout
        use_cpu_initialization=True,
        # Fusions of apex and transformer-engine; the first that is used needs apex (glm.platform.kernels)
        bias_activation_fusion=False,
        use_te_activation_func=True,  # the activation is the spec's: glm.model.gated, or transformer-engine's
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=adds_gradients,
        persist_layer_norm=False,
        **RECOMPUTE[recompute],
        # Layout
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.tp > 1,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        pipeline_model_parallel_layout=_pipeline_layout(model, layout),
        # Batched messages of both directions are matched by their order alone: with two interleaved stages, whose neighbours
        # on both sides are one rank, activations and gradients change places in silence (p2p_communication.py:57).
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
    )
    _merge_upstream(fields, upstream or {}, {field.name for field in dataclasses.fields(TransformerConfig)})
    return TransformerConfig(**fields)


def stage_config(recipe: ModelStageRecipe):
    """The TransformerConfig of a training stage on this rank's platform."""
    return transformer_config(
        recipe.model,
        params=recipe.precision.params,
        layout=recipe.layout,
        recompute=recipe.recompute,
        sequence_balance_weight=recipe.losses.sequence_balance_weight,
        adds_gradients=active().adds_gradients,
        upstream=recipe.megatron,
    )


def _pipeline_layout(model: Model, layout: Layout) -> list[list[str]] | None:
    """What each chunk holds, in the order of the network; None without a pipeline."""
    if layout.pp == 1:
        return None
    chunks = [["decoder"] * count for count in layout.layers_per_chunk(model)]
    chunks[0].insert(0, "embedding")
    chunks[-1] += ["mtp"] * model.num_mtp_layers + ["loss"]
    return chunks


def _merge_upstream(fields: dict, upstream: dict[str, object], known: set[str]) -> None:
    for key, value in upstream.items():
        if key not in known:
            near = get_close_matches(key, known, n=1)
            raise RecipeError(
                f"recipe key megatron.{key}", "no such field of megatron's TransformerConfig",
                f"a field of the installed release{f', such as {near[0]}' if near else ''}", "correct or remove the key",
            )
        if key in fields:
            raise RecipeError(
                f"recipe key megatron.{key}", f"{value!r}", "a field that the recipe's own sections do not set",
                "use the recipe's section for it",
            )
        fields[key] = value
