"""FP8 through the converters: out, back and out again, proved on the way, and what does not divide is said."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm.checkpoint import manifest
from glm.convert.differences import compare
from glm.convert.from_hf import from_hf
from glm.convert.to_hf import to_hf
from glm.convert.verify import verify
from glm.errors import CheckpointError
from glm.weights.fp8 import FP8, dequantise, fp8_plan, fp8_tensors, quantise, scale_name
from glm.weights.hf_reader import HFFolder
from tests.model_fixture import random_hf_weights, tiny_shape, write_hf_folder
from tests.tokenizer_fixture import write_tokenizer
from tools.convert import from_hf as from_hf_command, to_hf as to_hf_command, verify as verify_command

SHAPE = tiny_shape(
    num_layers=2, hidden_size=128, dense_ffn_size=320, expert_ffn_size=128, head_dim=64, num_attention_heads=8, num_query_groups=2, num_experts=4,
    init_std=0.1,
)
"""The dense layer does not divide, as Air's; query groups of 4 heads are two blocks high, keys and values one."""
PLAN = fp8_plan(SHAPE)
NAME = "model.layers.1.self_attn.q_proj.weight"


def weights(dtype):
    return {name: t if name.endswith("correction_bias") else t.to(dtype) for name, t in random_hf_weights(SHAPE).items()}


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def made(request, tmp_path_factory):
    """(weights, checkpoint, FP8 export)"""
    root = tmp_path_factory.mktemp("made")
    source = write_hf_folder(root / "hf", SHAPE, weights(request.param), dtype=str(request.param).removeprefix("torch."), eos_token_id=[3, 4])
    write_tokenizer(root / "tokenizer", SHAPE.vocab_size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "tokenizer" / name, source)
    checkpoint = from_hf(source, root / "checkpoints")
    to_hf(checkpoint, root / "fp8", fp8=True, max_shard_bytes=500_000)
    return weights(request.param), checkpoint, root / "fp8"


def held(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bytes(left, right):
    return left.dtype is right.dtype and torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def test_an_export_holds_what_quantising_each_matrix_gives_and_tells_it(made):
    tensors, checkpoint, folder = made
    expected, found = dict(fp8_tensors(tensors.items(), PLAN)), held(folder)
    assert found.keys() == expected.keys() and PLAN.quantised and PLAN.kept
    assert [name for name, tensor in expected.items() if not same_bytes(found[name], tensor)] == []
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == PLAN.config and config["eos_token_id"] == [3, 4]
    assert "model.layers.0.mlp.gate_proj" in config["quantization_config"]["modules_to_not_convert"]
    assert (folder / "tokenizer.json").read_bytes() == (checkpoint / "hf/tokenizer.json").read_bytes()
    told = json.loads((folder / "manifest.json").read_text())["tensors"]
    assert told.keys() == expected.keys() and told[NAME]["dtype"] == "float8_e4m3fn"


def test_an_export_verifies_against_its_checkpoint_as_rounded(made):
    found = verify(made[1], made[2])
    assert found.quantised == len(PLAN.quantised) and found.digests and found.max_logit_difference is None
    assert found.bytes == sum(tensor.nbytes for tensor in held(made[2]).values())


def test_an_import_has_exactly_the_values_that_were_read(made, tmp_path):
    tensors, checkpoint, folder = made
    again = from_hf(folder, tmp_path / "again")
    assert manifest.stored_params(again) == manifest.stored_params(checkpoint)
    assert compare(again, HFFolder(folder)).differing == {} and compare(again, HFFolder(folder)).quantised == 0
    to_hf(again, tmp_path / "plain")
    plain, quantised = held(tmp_path / "plain"), held(folder)
    assert plain.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = dequantise(quantised[name], quantised[scale_name(name)], tensor.dtype) if name in PLAN.quantised else tensor
        assert same_bytes(plain[name], expected), name
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


def test_fp8_in_and_out_again_is_byte_for_byte_the_same_folder(made, tmp_path):
    folder = made[2]
    to_hf(from_hf(folder, tmp_path / "again"), tmp_path / "fp8", fp8=True, max_shard_bytes=500_000)
    names = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert {path.name for path in (tmp_path / "fp8").iterdir()} - {"manifest.json"} == names and len(names) > 6
    assert [name for name in names if (folder / name).read_bytes() != (tmp_path / "fp8" / name).read_bytes()] == []


def test_rows_are_those_of_the_whole_matrix(made):
    read = HFFolder(made[2])
    for name in (NAME, "model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        whole = read.get(name)
        for first, count in ((0, 1), (0, len(whole)), (100, 28), (127, 1), (63, len(whole) - 63), (len(whole) - 1, 1)):
            assert same_bytes(read.rows(name, first, count), whole[first : first + count]), (name, first, count)


@pytest.mark.parametrize("name", [NAME, scale_name(NAME)])
def test_a_changed_value_or_factor_is_found_with_and_without_a_manifest(made, tmp_path, name):
    shutil.copytree(made[2], tmp_path / "fp8")
    for file in (tmp_path / "fp8").glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name].view(torch.uint8).view(-1)[5] ^= 8
            save_file(tensors, file, {"format": "pt"})
    for work in (lambda: verify(made[1], tmp_path / "fp8"), lambda: from_hf(tmp_path / "fp8", tmp_path / "refused")):
        with pytest.raises(CheckpointError, match=rf"{name}\n.*other bytes than when it was written"):
            work()
    assert not (tmp_path / "refused/step_00000000").exists()
    (tmp_path / "fp8/manifest.json").unlink()
    with pytest.raises(CheckpointError, match=f"1 of {len(made[0])} tensors differ, most: {NAME} by"):
        verify(made[1], tmp_path / "fp8")


def test_factors_that_others_made_are_read_as_they_mean_it(tmp_path):
    """Powers of two, as some quantisers have them: the import is exact, and a new export may differ in its bytes but not in values."""
    tensors = dict(fp8_tensors(weights(torch.bfloat16).items(), PLAN))
    values, scales = quantise(weights(torch.bfloat16)[NAME])
    factors = torch.exp2(torch.ceil(torch.log2(scales)))
    tensors |= {NAME: (dequantise(values, scales, torch.float32) / factors.repeat_interleave(128, 0).repeat_interleave(128, 1)).to(FP8),
                scale_name(NAME): factors}
    folder = write_hf_folder(tmp_path / "hf", SHAPE, tensors, dtype="bfloat16", quantization_config=PLAN.config)
    checkpoint = from_hf(folder, tmp_path / "checkpoints")
    found = compare(checkpoint, HFFolder(folder))
    assert found.differing == {} and found.quantised == 0
    to_hf(checkpoint, tmp_path / "again", fp8=True)
    again = HFFolder(tmp_path / "again")
    assert not torch.equal(again.scale_place(NAME).read(), factors)
    ours, theirs = again.get(NAME).float(), HFFolder(folder).get(NAME).float()
    assert (ours - theirs).abs().max() <= theirs.abs().max() / 28


def test_the_commands_export_import_and_verify(made, tmp_path, capsys):
    assert to_hf_command.main([str(made[1]), str(tmp_path / "fp8"), "--fp8"]) == 0
    assert "not in FP8: model.layers.0.mlp.down_proj, model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj" in capsys.readouterr().out
    assert from_hf_command.main([str(tmp_path / "fp8"), str(tmp_path / "checkpoints")]) == 0
    capsys.readouterr()
    assert verify_command.main([str(made[1]), str(tmp_path / "fp8")]) == 0
    assert f"{len(made[0])} tensors" in (told := capsys.readouterr().out) and f"{len(PLAN.quantised)} of them after rounding to FP8" in told
    assert verify_command.main([str(tmp_path / "checkpoints"), str(tmp_path / "fp8")]) == 0
    assert "rounding" not in capsys.readouterr().out
