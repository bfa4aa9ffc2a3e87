"""Why each field of megatron's TransformerConfig has the value it has: docs/model.md prints this table, a test keeps it whole.

"P" is the GLM-4.5 technical report (arXiv 2508.06471), "HF" the released configuration as transformers' Glm4MoeConfig and
SGLang's glm4_moe read it, "ours" a choice of this suite where both are silent.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """One reason for one field or for several that stand and fall together."""

    fields: tuple[str, ...]
    reason: str
    source: str


def _reason(fields: str, reason: str, source: str) -> Reason:
    return Reason(tuple(fields.split()), reason, source)


SET = (
    _reason("num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels num_moe_experts moe_ffn_hidden_size "
            "moe_router_topk mtp_num_layers qk_layernorm", "the shape of the network: the model file", "P Table 1"),
    _reason("moe_layer_freq", "dense layers first, then experts in every layer", "P Table 1"),
    _reason("moe_shared_expert_intermediate_size", "one shared expert as wide as a routed one", "P Table 1; HF n_shared_experts"),
    _reason("moe_router_topk_scaling_factor", "2.5 in 355B, 1.0 in Air: model.routed_scaling_factor", "HF"),
    _reason("layernorm_epsilon", "model.norm_epsilon, 1e-5", "HF rms_norm_eps; P gives none"),
    _reason("init_method_std", "model.init_std, 0.02; drawn by glm.model.initialize", "HF initializer_range; P gives none"),
    _reason("add_qkv_bias add_bias_linear", "query, key and value have a bias, nothing else has", "HF attention_bias"),
    _reason("gated_linear_unit activation_func", "SwiGLU", "HF hidden_act"),
    _reason("normalization", "RMSNorm before attention, before the feed-forward and at the end", "HF"),
    _reason("attention_dropout hidden_dropout", "none; upstream's defaults are 0.1", "P 2.4"),
    _reason("mtp_loss_scaling_factor moe_router_bias_update_rate", "0 here: the values of a step come from its plan (losses.mtp_weight, "
            "router.bias_update_rate)", "P 2.4"),
    _reason("moe_router_score_function moe_router_enable_expert_bias moe_router_pre_softmax", "sigmoid scores; the choice is by score plus a "
            "balancing bias, the weights are the scores without it, renormalised", "P 2.1; HF noaux_tc"),
    _reason("moe_router_load_balancing_type moe_aux_loss_coeff", "sequence-level balance loss of weight losses.sequence_balance_weight", "P 2.4"),
    _reason("moe_router_dtype", "scores in fp32: a choice among 160 is decided in the last bits", "HF; SGLang"),
    _reason("moe_token_dispatcher_type", "all-to-all: no token is dropped, none is sent where it is not needed", "ours"),
    _reason("moe_grouped_gemm", "off: it asks for transformer-engine's experts; ours (glm.model.experts) use torch's grouped product", "ours"),
    _reason("calculate_per_token_loss", "sums over the tokens of the global batch; upstream's default averages rank by rank", "ours"),
    _reason("params_dtype pipeline_dtype bf16", "precision.params; what a pipeline sends has the type of the parameters", "P 6.1: bf16"),
    _reason("attention_softmax_in_fp32", "no rounding of attention weights", "HF"),
    _reason("perform_initialization use_cpu_initialization", "weights come from glm.model.initialize, the same under every layout", "ours"),
    _reason("use_te_activation_func", "the activation comes from the layer spec: glm.model.gated", "ours"),
    _reason("gradient_accumulation_fusion", "on where NVIDIA's apex is installed (glm.platform.kernels)", "ours"),
    _reason("bias_activation_fusion bias_dropout_fusion masked_softmax_fusion apply_rope_fusion persist_layer_norm",
            "kernels of apex or transformer-engine; without them the mathematics is the same", "ours"),
    _reason("recompute_granularity recompute_method recompute_num_layers recompute_modules", "the recipe's recompute", "ours"),
    _reason("tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size context_parallel_size "
            "expert_model_parallel_size expert_tensor_parallel_size pipeline_model_parallel_layout", "the recipe's layout", "ours"),
    _reason("sequence_parallel", "with tensor parallelism always: norms and residuals are then divided too", "ours"),
    _reason("overlap_p2p_comm batch_p2p_comm", "interleaved stages send without batching: batched messages of two stages change places in silence",
            "p2p_communication.py:57"),
)
"""Fields that glm.model.config sets."""

KEPT = (
    _reason("softmax_scale softmax_type rotary_interleaved window_size window_attn_skip_freq no_rope_freq mrope_section",
            "attention over the whole context, scaled by 1/sqrt(head_dim), no sink, halves of a head rotated", "HF"),
    _reason("qk_l2_norm qk_clip qk_clip_alpha qk_clip_threshold log_max_attention_logit attention_output_gate",
            "QK-norm bounds the logits (355B); no clip, no gate", "P 2.1"),
    _reason("multi_latent_attention experimental_attention_variant dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk "
            "dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss linear_attention_freq linear_conv_kernel_dim linear_key_head_dim "
            "linear_value_head_dim linear_num_key_heads linear_num_value_heads", "other attention than grouped queries", "P Table 1"),
    _reason("is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path heterogeneous_block_specs "
            "hetereogenous_dist_checkpoint", "every layer is a transformer layer of one kind", "P Table 1"),
    _reason("fp32_residual_connection apply_residual_connection_post_layernorm layernorm_zero_centered_gamma memory_efficient_layer_norm",
            "pre-norm residuals in the type of the parameters, norm weights around 1", "HF"),
    _reason("activation_func_fp8_input_store glu_linear_offset activation_func_clamp_value use_fused_weighted_squared_relu", "plain SwiGLU", "HF"),
    _reason("init_method output_layer_init_method embedding_init_method embedding_init_method_std init_model_with_meta_device",
            "unused: glm.model.initialize draws every tensor", "ours"),
    _reason("apply_query_key_layer_scaling", "a remedy for fp16", "ours"),
    _reason("fp16 enable_autocast autocast_dtype grad_scale_func", "bf16 or fp32 parameters need neither casts nor loss scaling", "P 6.1"),
    _reason("fp8 fp8_recipe fp8_param fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad "
            "fp8_dot_product_attention fp8_multi_head_attention tp_only_amax_red first_last_layers_bf16 num_layers_at_start_in_bf16 "
            "num_layers_at_end_in_bf16 use_kitchen use_kitchen_attention kitchen_attention_backend fp4 fp4_recipe fp4_param fp4_quantizer_factory "
            "quant_recipe moe_router_padding_for_quantization moe_router_padding_for_fp8", "training is bf16; 8-bit weights are for rollouts",
            "P 6.1"),
    _reason("disable_bf16_reduced_precision_matmul batch_invariant_mode", "platform settings, not the model's", "ours"),
    _reason("deterministic_mode", "the recipe's deterministic speaks to torch itself (glm.runtime)", "ours"),
    _reason("moe_shared_expert_gate", "the shared expert is added as it is", "HF"),
    _reason("moe_router_num_groups moe_router_group_topk moe_router_topk_limited_devices", "one group: every expert may be chosen", "HF n_group 1"),
    _reason("moe_z_loss_coeff moe_input_jitter_eps moe_router_force_load_balancing", "the balancing of the report and no other", "P 2.4"),
    _reason("moe_token_dropping moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy", "no token is dropped", "ours"),
    _reason("moe_apply_probs_on_input moe_latent_size moe_extended_tp moe_use_legacy_grouped_gemm", "not this mixture of experts", "P 2.1"),
    _reason("moe_enable_routing_replay", "rollout and trainer each route; their logprobs are compared (rl.max_logprob_difference)", "ours"),
    _reason("moe_shared_expert_overlap moe_permute_fusion moe_router_fusion overlap_moe_expert_parallel_comm delay_wgrad_compute "
            "ep_overlap_early_attn_memory_release moe_enable_deepep moe_flex_dispatcher_backend moe_deepep_num_sms moe_hybridep_num_sms",
            "faster, with packages this suite does not require; the plain path is the one proved", "ours"),
    _reason("moe_per_layer_logging", "the loop logs load and bias of every layer itself", "ours"),
    _reason("moe_layer_recompute distribute_saved_activations num_microbatches_with_partial_activation_checkpoints",
            "deprecated, or second ways to say what recompute says", "ours"),
    _reason("cpu_offloading cpu_offloading_num_layers _cpu_offloading_context cpu_offloading_activations cpu_offloading_weights "
            "cpu_offloading_double_buffering fine_grained_activation_offloading offload_modules min_offloaded_tensor_size",
            "activations are recomputed rather than moved", "ours"),
    _reason("num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage account_for_embedding_in_pipeline_split "
            "account_for_loss_in_pipeline_split mtp_standalone", "layout.pipeline_layers says it all", "ours"),
    _reason("variable_seq_lengths", "all packs of a pipeline's step are made of one length", "ours"),
    _reason("microbatch_group_size_per_vp_stage", "as many as pipeline stages, upstream's choice", "ours"),
    _reason("pipeline_model_parallel_comm_backend batch_p2p_sync use_ring_exchange_p2p overlap_p2p_comm_warmup_flush "
            "deallocate_pipeline_outputs defer_embedding_wgrad_compute wgrad_deferral_limit", "the plain pipeline schedule", "ours"),
    _reason("tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag "
            "tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1 "
            "tp_comm_bootstrap_backend symmetric_ar_type", "only with transformer-engine's overlapped collectives, which are off", "ours"),
    _reason("async_tensor_model_parallel_allreduce", "without sequence parallelism only, which tp > 1 always has here", "ours"),
    _reason("use_te_rng_tracker inference_rng_tracker", "nothing draws random numbers while training", "ours"),
    _reason("hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank hybrid_context_parallel cp_comm_type",
            "context parallelism gathers keys and values: see Long context", "ours"),
    _reason("attention_backend transformer_impl flash_decode fused_single_qkv_rope", "kernels.attention decides through the layer specs", "ours"),
    _reason("cross_entropy_loss_fusion cross_entropy_fusion_impl", "the unfused loss works on every device", "ours"),
    _reason("enable_cuda_graph cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps external_cuda_graph "
            "cuda_graph_impl cuda_graph_scope", "documents of changing lengths do not fit a recorded graph", "ours"),
    _reason("finalize_model_grads_func no_sync_func", "set by the trainer once the model is wrapped (glm.train.step)", "ours"),
    _reason("grad_sync_func param_sync_func", "gradients are summed once a step, parameters once after it", "ours"),
    _reason("timers barrier_with_L1_time config_logger_dir test_mode", "the loop measures and logs itself", "ours"),
    _reason("clone_scatter_output_in_embedding disable_parameter_transpose_cache", "memory details without effect on numbers", "ours"),
    _reason("inference_sampling_seed use_inference_optimized_layers inference_fuse_tp_communication mlp_chunks_for_prefill",
            "inference is SGLang's", "ours"),
)
"""Fields that keep upstream's default."""


def markdown() -> str:
    """Both tables for docs/model.md."""
    lines = []
    for title, rows in (("Set by glm/model/config.py", SET), ("Left at megatron's default", KEPT)):
        lines += [f"### {title}", "", "| fields | reason | source |", "|---|---|---|"]
        lines += [f"| {', '.join(f'`{field}`' for field in row.fields)} | {row.reason} | {row.source} |" for row in rows] + [""]
    return "\n".join(lines)
