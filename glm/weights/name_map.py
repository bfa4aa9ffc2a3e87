"""The one table of weight names: megatron's on the left, Hugging Face's on the right.

Export, import, verification and weight sync all read it. A tensor or a row without a partner is an error.
"""

from dataclasses import dataclass
from typing import Iterable

from glm.errors import CheckpointError
from glm.recipe.sections import Model
from glm.weights.transforms import EXPERTS_DOWN, EXPERTS_GATE_UP, GATE_UP, QKV, SAME, Transform


@dataclass(frozen=True)
class Row:
    """One megatron tensor and the Hugging Face tensors it holds."""

    megatron: str
    hf: tuple[str, ...]
    """``{expert}`` stands for the number of the expert."""
    transform: Transform = SAME

    @property
    def is_router_bias(self) -> bool:
        """Stays float32 everywhere: in bfloat16 neighbouring values are equal and tokens change their experts."""
        return self.megatron.endswith(".expert_bias")

    def names(self, experts: Iterable[int]) -> list[str]:
        """Hugging Face names in the order of the transform; of ``experts`` if the row is per expert."""
        if not self.transform.per_expert:
            return list(self.hf)
        return [name.replace("{expert}", str(expert)) for expert in experts for name in self.hf]


_BEFORE = (Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),)
_AFTER = (
    Row("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Row("output_layer.weight", ("lm_head.weight",)),
)
_ATTENTION = (
    Row("input_layernorm.weight", ("input_layernorm.weight",)),
    Row("self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), QKV),
    Row("self_attention.linear_qkv.bias", ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"), QKV),
    Row("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
    Row("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)),
)
_HEAD_NORMS = (
    Row("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",)),
    Row("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",)),
)
_DENSE = (
    Row("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), GATE_UP),
    Row("mlp.linear_fc2.weight", ("mlp.down_proj.weight",)),
)
_EXPERTS = (
    Row("mlp.router.weight", ("mlp.gate.weight",)),
    Row("mlp.router.expert_bias", ("mlp.gate.e_score_correction_bias",)),  # a buffer, not a parameter
    Row("mlp.experts.weight1",
        ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"), EXPERTS_GATE_UP),
    Row("mlp.experts.weight2", ("mlp.experts.{expert}.down_proj.weight",), EXPERTS_DOWN),
)
_SHARED_EXPERT = (
    Row("mlp.shared_experts.linear_fc1.weight",
        ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"), GATE_UP),
    Row("mlp.shared_experts.linear_fc2.weight", ("mlp.shared_experts.down_proj.weight",)),
)
_MTP = (  # both sides put the embedding before the hidden state in eh_proj's input
    Row("enorm.weight", ("enorm.weight",)),
    Row("hnorm.weight", ("hnorm.weight",)),
    Row("eh_proj.weight", ("eh_proj.weight",)),
    Row("final_layernorm.weight", ("shared_head.norm.weight",)),
)
_COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


def rows(shape: Model) -> tuple[Row, ...]:
    """Every row of a model of this shape, layer by layer, the MTP layer last."""
    table = list(_BEFORE)
    for layer in range(shape.num_layers):
        is_dense = layer < shape.num_dense_layers
        table += _under(f"decoder.layers.{layer}.", f"model.layers.{layer}.", _layer(shape, is_dense))
    table += _AFTER
    for index in range(shape.num_mtp_layers):
        hf = f"model.layers.{shape.num_layers + index}."
        table += _under(f"mtp.layers.{index}.", hf, _MTP)
        # megatron-core 0.16 calls it transformer_layer, later releases mtp_model_layer
        table += _under(f"mtp.layers.{index}.transformer_layer.", hf, _layer(shape, is_dense=False))
    return tuple(table)


def hf_names(shape: Model) -> list[str]:
    """Names of all tensors of an exported model, in the order of ``rows``."""
    return [name for row in rows(shape) for name in row.names(range(shape.num_experts))]


def copies(shape: Model) -> dict[str, str]:
    """{copy: original}: GLM-4.5's released files repeat embedding and head in the MTP layer, GLM-4.6's do not."""
    return {
        f"model.layers.{shape.num_layers + index}.{name}": original
        for index in range(shape.num_mtp_layers) for name, original in _COPIES.items()
    }


def check_names(found: Iterable[str], expected: Iterable[str], *, optional: Iterable[str] = (), where: str) -> None:
    """Raises CheckpointError naming the tensors that only one side has."""
    found, expected = set(found), set(expected)
    missing, unknown = sorted(expected - found), sorted(found - expected - set(optional))
    if missing or unknown:
        parts = [f"{kind}: {_some(names)}" for kind, names in (("missing", missing), ("without a partner", unknown)) if names]
        raise CheckpointError(
            where, "; ".join(parts), f"exactly the {len(expected)} tensors of a model of its shape",
            "check that configuration and weights belong together, and that no file of the folder is missing",
        )


def _layer(shape: Model, is_dense: bool) -> tuple[Row, ...]:
    norms = _HEAD_NORMS if shape.qk_norm else ()
    shared = _SHARED_EXPERT if shape.num_shared_experts else ()
    return _ATTENTION + norms + (_DENSE if is_dense else _EXPERTS + shared)


def _under(megatron: str, hf: str, table: tuple[Row, ...]) -> list[Row]:
    return [Row(megatron + row.megatron, tuple(hf + name for name in row.hf), row.transform) for row in table]


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
