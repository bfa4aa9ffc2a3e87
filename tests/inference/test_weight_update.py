"""A push arrives whole, in target and draft, or is an error that names what did not arrive."""

import asyncio

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_model import save_model, tiny_config

from glm.errors import EngineError
from glm.inference.client import Sampling
from glm.inference.engine_layout import compare, expected_digests

LAYERS = tiny_config().num_hidden_layers


def expected(tensors):
    return expected_digests(tensors, LAYERS, dtype=torch.float32, has_draft=True)


def nudged(tensors, name):
    """The tensors with one value of one of them changed by one bfloat16 step."""
    changed = tensors[name].clone()
    value = changed.view(-1)[3].to(torch.bfloat16)
    changed.view(-1)[3] = torch.nextafter(value, torch.tensor(torch.inf, dtype=torch.bfloat16)).float()
    assert not torch.equal(changed, tensors[name])
    return tensors | {name: changed}


def test_a_push_reaches_every_tensor_of_target_and_draft(ask, loaded, other_model_folder):
    before = ask(lambda client: client.generate([5, 6, 7], Sampling(0.0, 8)))
    ask(lambda client: client.update_weights(other_model_folder, "7"))
    found = ask(lambda client: client.weight_digests())
    compare(expected(load_file(other_model_folder / "model.safetensors")), found)
    after = ask(lambda client: client.generate([5, 6, 7], Sampling(0.0, 8)))
    assert (before.weight_version, after.weight_version) == ("0", "7")
    assert before.token_ids != after.token_ids
    with pytest.raises(EngineError, match="different"):  # the twin: the old weights
        compare(expected(loaded), found)


@pytest.mark.parametrize("name, engine_name", [
    ("model.layers.2.mlp.gate.e_score_correction_bias", "target.model.layers.2.mlp.gate.e_score_correction_bias"),
    (f"model.layers.{LAYERS}.mlp.gate.e_score_correction_bias", "draft.model.decoder.mlp.gate.e_score_correction_bias"),
    (f"model.layers.{LAYERS}.mlp.experts.5.up_proj.weight", "draft.model.decoder.mlp.experts.w13_weight"),
    (f"model.layers.{LAYERS}.eh_proj.weight", "draft.model.eh_proj.weight"),
    ("model.layers.1.self_attn.k_proj.bias", "target.model.layers.1.self_attn.qkv_proj.bias"),
])
def test_one_value_off_by_one_step_is_named(ask, loaded, name, engine_name):
    found = ask(lambda client: client.weight_digests())
    compare(expected(loaded), found)
    with pytest.raises(EngineError, match=f"different 1: {engine_name}") as problem:
        compare(expected(nudged(loaded, name)), found)
    assert "missing" not in problem.value.found


def test_the_embedding_is_the_same_tensor_in_target_and_draft(ask, loaded):
    found = ask(lambda client: client.weight_digests())
    with pytest.raises(EngineError, match="different 2: draft.model.embed_tokens.weight, target.model.embed_tokens.weight"):
        compare(expected(nudged(loaded, "model.embed_tokens.weight")), found)


def test_a_perturbed_push_is_what_the_engine_then_holds(ask, loaded, tmp_path):
    changed = nudged(loaded, f"model.layers.{LAYERS}.self_attn.o_proj.weight")
    ask(lambda client: client.update_weights(save_model(tmp_path / "changed", tiny_config(), changed), "8"))
    found = ask(lambda client: client.weight_digests())
    compare(expected(changed), found)
    with pytest.raises(EngineError, match="different 1: draft.model.decoder.self_attn.o_proj.weight"):
        compare(expected(loaded), found)


def test_replies_in_flight_survive_a_push(ask, loaded, other_model_folder):
    async def push_meanwhile(client):
        running = asyncio.create_task(client.generate_batch([[5, 6, 7, i] for i in range(16)], Sampling(1.0, 100)))
        await asyncio.sleep(0.2)
        await client.update_weights(other_model_folder, "9")
        return await running

    replies = ask(push_meanwhile)
    assert all(len(reply.token_ids) == 100 or reply.finish_reason == "stop" for reply in replies)
    assert any(reply.weight_version == "9" for reply in replies)


def test_a_folder_without_weights_is_an_error(ask, loaded, tmp_path):
    with pytest.raises(EngineError):
        ask(lambda client: client.update_weights(tmp_path, "10"))


def test_an_incomplete_export_is_an_error_before_anything_is_compared(loaded):
    tensors = dict(loaded)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(EngineError, match="qkv_proj.weight"):
        expected(tensors)
