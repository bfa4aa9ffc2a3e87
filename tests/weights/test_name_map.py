"""The table has a row for every tensor of both sides, and says so when one has no partner."""

import pytest
import torch

from glm.errors import CheckpointError
from glm.weights.gather import hf_tensors, load_hf_tensors
from glm.weights.name_map import check_names, copies, hf_names, rows
from tests.model_fixture import SHAPES, megatron_model, random_hf_weights, tiny_shape


@pytest.mark.parametrize("shape", [*SHAPES.values(), tiny_shape(num_mtp_layers=0)], ids=[*SHAPES, "no mtp"])
def test_the_names_are_those_of_transformers_and_of_megatron(shape):
    written = random_hf_weights(shape)
    if not shape.num_mtp_layers:
        written = {name: tensor for name, tensor in written.items() if not name.startswith(f"model.layers.{shape.num_layers}.")}
    assert sorted(hf_names(shape)) == sorted(written)
    model = megatron_model(shape, written)
    assert {row.megatron for row in rows(shape)} == {
        name for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)
    }


def test_what_is_loaded_comes_out_again():
    shape = SHAPES["odd"]
    weights = random_hf_weights(shape)
    found = dict(hf_tensors([megatron_model(shape, weights)], shape))
    assert list(found) == hf_names(shape)
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor) and found[name].is_contiguous(), name


def test_the_router_and_its_bias_stay_float32_in_a_bfloat16_model():
    shape = tiny_shape()
    weights = random_hf_weights(shape)
    weights["model.layers.2.mlp.gate.e_score_correction_bias"] += 7  # where bfloat16 has steps of 1/32
    model = megatron_model(shape, weights, params="bf16")
    for name, tensor in hf_tensors([model], shape):
        if ".mlp.gate." in name:
            assert tensor.dtype is torch.float32 and torch.equal(tensor, weights[name])
        else:
            assert tensor.dtype is torch.bfloat16 and torch.equal(tensor, weights[name].bfloat16())


def test_weights_loaded_after_megatron_rounded_the_model_have_an_exact_router_bias():
    shape = tiny_shape()
    weights = random_hf_weights(shape)
    model = megatron_model(shape).bfloat16()  # as Float16Module does when a trainer is built
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    load_hf_tensors([model], shape, weights.__getitem__)
    assert torch.equal(dict(hf_tensors([model], shape))[name], weights[name])
    assert not torch.equal(weights[name].bfloat16().float(), weights[name]), "rounding would not show"


def test_a_megatron_tensor_without_a_row_is_an_error():
    shape = tiny_shape()
    model = megatron_model(shape)
    model.decoder.layers[1].surprise = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"without a partner: decoder\.layers\.1\.surprise"):
        list(hf_tensors([model], shape))


def test_a_row_without_a_megatron_tensor_is_an_error():
    model = megatron_model(tiny_shape(qk_norm=False))
    with pytest.raises(CheckpointError, match=r"missing: decoder\.layers\.0\.self_attention\.k_layernorm\.weight"):
        list(hf_tensors([model], tiny_shape()))


def test_a_tensor_of_another_shape_is_named():
    shape = tiny_shape()
    weights = random_hf_weights(shape)
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    weights[name] = weights[name][:, :-1]
    with pytest.raises(CheckpointError, match=rf"{name}\n.*shape \[32, 63\]\n.*shape \[32, 64\]"):
        load_hf_tensors([megatron_model(shape)], shape, weights.__getitem__)


def test_missing_and_unknown_names_are_both_told_and_copies_are_not_unknown():
    shape = tiny_shape()
    names = hf_names(shape)
    check_names([*names, *copies(shape)], names, optional=copies(shape), where="here")
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight; without a partner: model\.layers\.9\.x"):
        check_names([*(name for name in names if name != "lm_head.weight"), "model.layers.9.x"], names, where="here")
