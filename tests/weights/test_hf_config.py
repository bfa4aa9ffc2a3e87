"""config.json says the same to transformers, to SGLang and to us, and nothing we do not train is read quietly."""

import json

import pytest
from transformers import Glm4MoeConfig

from glm.errors import CheckpointError
from glm.model.size import parameters
from glm.weights.hf_config import config_json, model_section, rotary_base
from tests.model_fixture import SHAPES, tiny_shape, transformers_config


def made(shape=tiny_shape(), **changes) -> dict:
    return config_json(shape, rotary_base=1_000_000, params="fp32") | changes


@pytest.mark.parametrize("name", SHAPES)
def test_model_and_rotation_survive_the_trip_through_config_json(name):
    config = json.loads(json.dumps(made(SHAPES[name])))
    assert model_section(config) == SHAPES[name] and rotary_base(config) == 1_000_000


@pytest.mark.parametrize("name", SHAPES)
def test_what_transformers_writes_is_understood(name):
    config = transformers_config(SHAPES[name], initializer_range=SHAPES[name].init_std).to_dict()
    assert model_section(config) == SHAPES[name] and rotary_base(config) == 10_000


def test_transformers_reads_every_value_of_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(made()))
    ours, theirs = Glm4MoeConfig.from_pretrained(tmp_path), transformers_config(tiny_shape(), initializer_range=0.02, rope_theta=1e6)
    left_out = {"transformers_version", "architectures", "torch_dtype"}
    assert {k: v for k, v in ours.to_dict().items() if k not in left_out} == {k: v for k, v in theirs.to_dict().items() if k not in left_out}
    assert ours.rope_parameters == {"rope_type": "default", "rope_theta": 1_000_000, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("change", [
    {"model_type": "glm4"}, {"n_group": 2}, {"topk_group": 4}, {"attention_bias": False}, {"norm_topk_prob": False},
    {"tie_word_embeddings": True}, {"hidden_act": "gelu"}, {"rope_scaling": {"type": "yarn"}}, {"quantization_config": {"bits": 8}},
    {"num_nextn_predict_layers": 2}, {"scoring_func": "softmax"}, {"rope_theta": 10_000}, {"something_new": 1}, {"use_qk_norm": None},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
])
def test_a_value_of_another_network_is_refused_by_name(change):
    with pytest.raises(CheckpointError, match=next(iter(change))):
        config = made(**change)
        model_section(config)
        rotary_base(config)


@pytest.mark.parametrize("key", ["head_dim", "attention_bias", "use_qk_norm", "num_nextn_predict_layers", "routed_scaling_factor"])
def test_a_key_that_readers_fill_in_differently_must_be_there(key):
    config = made()
    del config[key]
    with pytest.raises(CheckpointError, match=f"config.json: {key}\n.*no such key"):
        model_section(config)


RELEASED = {
    "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu",
    "partial_rotary_factor": 0.5, "initializer_range": 0.02, "max_position_embeddings": 131072, "model_type": "glm4_moe",
    "norm_topk_prob": True, "num_attention_heads": 96, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000, "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.54.0", "use_cache": True, "vocab_size": 151552,
}
"""The keys of the released folders; their values as the technical report has them."""


@pytest.mark.parametrize(("own", "total"), [
    ({"hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160, "use_qk_norm": True,
      "routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "num_hidden_layers": 92}, 356_785_884_416),
    ({"hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 128, "use_qk_norm": False,
      "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "num_hidden_layers": 46}, 109_227_304_960),
], ids=["355B", "Air"])
@pytest.mark.parametrize("eos", [151329, [151329, 151336, 151338]], ids=["base", "chat"])
def test_the_released_configurations_are_understood(own, total, eos):
    config = RELEASED | own | {"eos_token_id": eos, "pad_token_id": 151329}
    assert parameters(model_section(config)).total == total and rotary_base(config) == 1_000_000
