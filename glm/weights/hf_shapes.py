"""The shape every Hugging Face tensor of a model must have, from the model section alone."""

from glm.recipe.sections import Model
from glm.weights.name_map import copies, hf_names


def hf_shapes(shape: Model) -> dict[str, tuple[int, ...]]:
    """{name: shape} of all tensors of an exported model in the order of ``hf_names``, then the MTP layer's copies."""
    of_suffix = _by_suffix(shape)
    found = {name: of_suffix[_suffix(name)] for name in hf_names(shape)}
    return found | {copy: found[original] for copy, original in copies(shape).items()}


def _suffix(name: str) -> str:
    """``self_attn.q_proj.weight`` of ``model.layers.3.self_attn.q_proj.weight``; experts without their number."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        parts = parts[3:]
    if parts[:2] == ["mlp", "experts"]:
        parts = ["mlp", "experts", *parts[3:]]
    return ".".join(parts)


def _by_suffix(shape: Model) -> dict[str, tuple[int, ...]]:
    H, V, E = shape.hidden_size, shape.vocab_size, shape.num_experts
    D, Q, KV = shape.head_dim, shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    widths = {
        "mlp": shape.dense_ffn_size, "mlp.experts": shape.expert_ffn_size,
        "mlp.shared_experts": shape.expert_ffn_size * shape.num_shared_experts,
    }
    norms = ("model.norm", "input_layernorm", "post_attention_layernorm", "enorm", "hnorm", "shared_head.norm")
    return {
        "model.embed_tokens.weight": (V, H), "lm_head.weight": (V, H), "eh_proj.weight": (H, 2 * H),
        "self_attn.q_proj.weight": (Q, H), "self_attn.q_proj.bias": (Q,), "self_attn.o_proj.weight": (H, Q),
        **{f"self_attn.{kind}_proj.weight": (KV, H) for kind in "kv"}, **{f"self_attn.{kind}_proj.bias": (KV,) for kind in "kv"},
        **{f"self_attn.{kind}_norm.weight": (D,) for kind in "qk"},
        "mlp.gate.weight": (E, H), "mlp.gate.e_score_correction_bias": (E,),
        **{f"{norm}.weight": (H,) for norm in norms},
        **{f"{mlp}.{kind}_proj.weight": (width, H) for mlp, width in widths.items() for kind in ("gate", "up")},
        **{f"{mlp}.down_proj.weight": (H, width) for mlp, width in widths.items()},
    }
