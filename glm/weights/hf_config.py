"""config.json of a Glm4Moe folder from the recipe's model section, and back.

Both directions read the same table. What this suite does not train is refused by name, not ignored: a configuration that
means another network must not load quietly.
"""

from typing import Any

from pydantic import ValidationError

from glm.errors import CheckpointError
from glm.recipe.sections import Model
from glm.weights.fp8 import check_quantization_config

# Model field: key in config.json. Every key must be there: transformers and SGLang fill gaps differently (attention_bias
# is False for one and True for the other), and neither knows head_dim.
_FIELDS = {
    "num_layers": "num_hidden_layers",
    "num_dense_layers": "first_k_dense_replace",
    "hidden_size": "hidden_size",
    "dense_ffn_size": "intermediate_size",
    "expert_ffn_size": "moe_intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "qk_norm": "use_qk_norm",
    "num_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "routed_scaling_factor": "routed_scaling_factor",
    "num_mtp_layers": "num_nextn_predict_layers",
    "vocab_size": "vocab_size",
    "max_position": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "init_std": "initializer_range",
}
_FIXED = {
    "model_type": "glm4_moe",
    "hidden_act": "silu",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
"""What a GLM-4.5 always has; written, and required where a reader's default could differ."""
_MAY_BE_ABSENT = {"attention_dropout", "hidden_act", "initializer_range", "tie_word_embeddings"}
_IF_GIVEN = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_scaling": None, "output_router_logits": False}
_ROTARY = {"rope_parameters", "rope_theta", "partial_rotary_factor"}
_WITHOUT_MEANING = {  # for the network
    "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
    "name_or_path", "_name_or_path", "id2label", "label2id", "problem_type", "return_dict", "output_attentions",
    "output_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder", "auto_map",
}
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def config_json(
    shape: Model, *, rotary_base: int, params: str, eos_token_ids: list[int] | None = None, pad_token_id: int | None = None,
) -> dict[str, Any]:
    """What transformers (4 and 5) and SGLang read: the rotation stands in the old and in the new keys."""
    values = shape.model_dump()
    dtype = _DTYPES[params]
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        **_FIXED,
        **{key: values[field] for field, key in _FIELDS.items()},
        "rope_theta": rotary_base,
        "partial_rotary_factor": shape.rotary_percent,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": rotary_base, "partial_rotary_factor": shape.rotary_percent,
        },
        "eos_token_id": eos_token_ids,
        "pad_token_id": pad_token_id,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def exported_config(
    original: dict[str, Any], shape: Model, *, rotary_base: int, params: str, quantization_config: dict[str, Any] | None = None,
    where: str = "config.json",
) -> dict[str, Any]:
    """The config.json of an export whose weights once came with ``original``: that, where it still describes the model.

    The weights' type and quantisation are those given. A model of another shape or rotation gets a new configuration, in
    which ``original`` keeps only what says nothing of the network (token ids, names).
    """
    same = model_section(original, where) == shape and _rotary(original, "rope_theta", where) == rotary_base
    if same:
        config = {key: value for key, value in original.items() if key != "quantization_config"}
        config |= {key: _DTYPES[params] for key in ("dtype", "torch_dtype") if key in original}
    else:
        kept = {key: value for key, value in original.items() if key in _WITHOUT_MEANING - {"dtype", "torch_dtype"}}
        config = config_json(shape, rotary_base=rotary_base, params=params) | kept
    return config if quantization_config is None else config | {"quantization_config": quantization_config}


def model_section(config: dict[str, Any], where: str = "config.json") -> Model:
    """The recipe's model section of a config.json. Raises CheckpointError naming the key that this suite does not have."""
    if config.get("quantization_config") is not None:
        check_quantization_config(config["quantization_config"], where)
    known = {*_FIELDS.values(), *_FIXED, *_IF_GIVEN, *_ROTARY, *_WITHOUT_MEANING, "quantization_config"}
    unknown = sorted(key for key, value in config.items() if key not in known and value is not None)
    if unknown:
        key = unknown[0]
        _refuse(where, key, repr(config[key])[:200], f"only keys of a GLM-4.5 model (also unknown: {unknown[1:]})" if unknown[1:]
                else "only keys of a GLM-4.5 model")
    missing = [key for key in (*_FIXED, *_FIELDS.values()) if key not in config and key not in _MAY_BE_ABSENT]
    if missing:
        _refuse(where, missing[0], "no such key", f"a value for each of {', '.join(missing)}: readers' defaults differ")
    for key, value in (_FIXED | _IF_GIVEN).items():
        if key in config and config[key] != value:
            _refuse(where, key, repr(config[key]), repr(value))
    fields = {field: config[key] for field, key in _FIELDS.items() if key in config}
    try:
        return Model(**fields, rotary_percent=_rotary(config, "partial_rotary_factor", where))
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else "shape"
        raise CheckpointError(
            where, f"{_FIELDS.get(field, field)}: {first['input']!r}"[:200], first["msg"], "correct the value in the file",
        ) from None


def rotary_base(config: dict[str, Any], where: str = "config.json") -> int:
    base = _rotary(config, "rope_theta", where)
    if base != int(base):
        _refuse(where, "rope_theta", repr(base), "a whole number")
    return int(base)


def _rotary(config: dict[str, Any], key: str, where: str) -> float:
    """A value that may stand in rope_parameters (transformers 5), beside it (transformers 4), or in both, equal."""
    parameters = config.get("rope_parameters") or {}
    kind = parameters.get("rope_type", "default")
    unknown = set(parameters) - {"rope_type", "rope_theta", "partial_rotary_factor"}
    if kind != "default" or unknown:
        _refuse(where, "rope_parameters", repr(parameters), "rope_type default without scaling")
    found = [place[key] for place in (parameters, config) if place.get(key) is not None]
    if not found:
        _refuse(where, key, "no such key", "a value, in rope_parameters or on its own")
    if any(value != found[0] for value in found):
        _refuse(where, key, f"{found[0]} in rope_parameters, {found[1]} on its own", "the same value twice")
    return found[0]


def _refuse(where: str, key: str, found: str, expected: str) -> None:
    raise CheckpointError(
        f"{where}: {key}", found, expected,
        "use a folder of GLM-4.5, 4.5-Air or of this suite's export; other networks are not supported",
    )
