"""What inspection lists is what is there, and what is odd is said; also of folders that no converter would take."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm.checkpoint import torch_dist
from glm.convert import inspect as inspection
from glm.convert.from_hf import from_hf
from glm.convert.inspect import inspect, part_of
from glm.convert.to_hf import to_hf
from glm.errors import CheckpointError
from glm.model.size import parameters
from glm.recipe.sections import Model
from glm.weights.digest import tensor_digest
from glm.weights.hf_config import config_json
from glm.weights.hf_shapes import hf_shapes
from glm.weights.name_map import rows
from tests.model_fixture import random_hf_weights, tiny_shape, write_hf_folder
from tools.convert import inspect as command

ROOT = Path(__file__).resolve().parents[2]
SHAPE = tiny_shape(init_std=0.1)
WEIGHTS = random_hf_weights(SHAPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hf_folder(tmp_path_factory.mktemp("hf"), SHAPE, WEIGHTS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, folder):
    return from_hf(folder, tmp_path_factory.mktemp("checkpoints") / "made")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, checkpoint):
    to_hf(checkpoint, out := tmp_path_factory.mktemp("out") / "export", max_shard_bytes=300_000)
    return out


def changed(tmp_path, change, **config):
    tensors = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
    change(tensors)
    return write_hf_folder(tmp_path / "changed", SHAPE, tensors, **config)


def test_a_folder_lists_every_tensor_with_file_and_manifest_digest(exported):
    found = inspect(exported)
    assert found.kind == "Hugging Face folder" and found.odd == () and found.about["manifest"] and found.about["files"] > 3
    assert {entry.name: (entry.dtype, entry.shape, entry.nbytes, entry.digest) for entry in found.entries} == {
        name: ("float32", tuple(tensor.shape), tensor.nbytes, tensor_digest(tensor)) for name, tensor in WEIGHTS.items()
    }
    assert all(entry.name in load_file(exported / entry.files[0]) for entry in found.entries)
    assert "config.json" in found.carried


def test_a_checkpoint_lists_megatrons_tensors(checkpoint):
    found = inspect(checkpoint)
    assert found.kind == "checkpoint" and found.odd == () and found.about["params"] == "fp32"
    assert {entry.name for entry in found.entries} == {row.megatron for row in rows(SHAPE)}
    assert all((checkpoint / file).is_file() for entry in found.entries for file in entry.files)
    assert "hf/config.json" in found.carried and all(entry.digest is None for entry in found.entries)


def test_totals_are_those_of_the_model_on_both_sides(folder, checkpoint):
    of_folder, of_checkpoint = inspect(folder).totals(), inspect(checkpoint).totals()
    numbers = {part: sums[1] for part, sums in of_folder.items()}
    assert numbers == {part: sums[1] for part, sums in of_checkpoint.items()}, "the tensors differ, their sums do not"
    size, biases = parameters(SHAPE), 4 * SHAPE.num_experts
    assert sum(numbers.values()) == size.total + biases
    assert numbers["MTP"] == size.mtp + SHAPE.num_experts and numbers["embedding"] == size.embedding and numbers["head"] == size.head
    assert numbers["router"] == 3 * (SHAPE.num_experts * SHAPE.hidden_size + SHAPE.num_experts)
    assert numbers["experts"] == 3 * SHAPE.num_experts * 3 * SHAPE.expert_ffn_size * SHAPE.hidden_size and "other" not in numbers


@pytest.mark.parametrize(("name", "part"), [
    ("model.layers.0.self_attn.q_norm.weight", "norms"), ("decoder.layers.0.self_attention.q_layernorm.weight", "norms"),
    ("model.layers.3.mlp.experts.7.up_proj.weight_scale_inv", "FP8 factors"), ("optimizer.state.exp_avg.decoder.layers.0.mlp.x", "optimizer"),
    ("model.layers.0.self_attn.k_proj.bias", "attention"), ("model.layers.0.mlp.up_proj.weight", "dense MLP"), ("something", "other"),
])
def test_a_name_belongs_to_one_part(name, part):
    assert part_of(name) == part


def test_computed_digests_are_those_of_the_tensors_and_both_sides_agree_on_what_is_alike(folder, checkpoint):
    of_folder = {entry.name: entry.digest for entry in inspect(folder, digests=True).entries}
    assert of_folder == {name: tensor_digest(tensor) for name, tensor in WEIGHTS.items()}
    of_checkpoint = {entry.name: entry.digest for entry in inspect(checkpoint, digests=True).entries}
    for row in rows(SHAPE):
        names = row.names(range(SHAPE.num_experts))
        assert of_checkpoint[row.megatron] == tensor_digest(row.transform.to_megatron([WEIGHTS[name] for name in names], SHAPE)), row


def test_a_pattern_limits_the_list_and_what_is_read(folder, monkeypatch):
    found = inspect(folder, "*.gate.e_score*", digests=True)
    assert [entry.name for entry in found.entries] == [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2, 3, 4)]


@pytest.mark.parametrize(("change", "config", "words"), [
    (lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.4.")], {"num_nextn_predict_layers": 0}, "no MTP layer"),
    (lambda t: t.pop("model.layers.4.eh_proj.weight"), {}, "refused for conversion: .*missing: model.layers.4.eh_proj.weight"),
    (lambda t: t.update({"model.layers.2.mlp.gate.e_score_correction_bias": torch.zeros(8).bfloat16()}), {},
     "router bias in bfloat16: model.layers.2.mlp.gate.e_score_correction_bias"),
])
def test_what_the_headers_tell_is_odd_is_said(tmp_path, change, config, words):
    import re

    found = inspect(changed(tmp_path, change, **config))
    assert any(re.match(words, told) for told in found.odd), found.odd


def test_what_the_contents_tell_is_odd_is_said_with_digests_only(tmp_path):
    def spoil(tensors):
        tensors["model.layers.3.mlp.experts.5.down_proj.weight"].zero_()
        tensors["model.layers.0.self_attn.o_proj.weight"][3, 4] = float("nan")
        tensors["model.norm.weight"][0] = -0.0

    made = changed(tmp_path, spoil)
    assert inspect(made).odd == ()
    assert inspect(made, digests=True).odd == (
        "not all finite: model.layers.0.self_attn.o_proj.weight", "all zero: model.layers.3.mlp.experts.5.down_proj.weight",
    )
    assert inspect(from_hf(made, tmp_path / "checkpoints"), digests=True).odd == ("not all finite: decoder.layers.0.self_attention.linear_proj.weight",)


def test_a_torn_file_is_told_and_the_others_are_listed(tmp_path, exported):
    made = tmp_path / "torn"
    made.mkdir()
    for path in exported.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    torn = sorted(made.glob("*.safetensors"))[1]
    lost = set(load_file(torn))
    torn.write_bytes(torn.read_bytes()[:-8])
    found = inspect(made)
    assert {entry.name for entry in found.entries} == WEIGHTS.keys() - lost
    assert any(words.startswith(f"unreadable: {torn}") for words in found.odd)


def test_a_file_that_the_index_does_not_name_is_told_with_what_it_repeats(tmp_path, exported):
    made = tmp_path / "both"
    made.mkdir()
    for path in exported.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    save_file({"lm_head.weight": torch.zeros(2)}, made / "model.safetensors")
    refused, twice = inspect(made).odd
    assert refused.startswith("refused for conversion:") and "both/model.safetensors: model.safetensors.index.json does not name it" in refused
    assert twice.startswith("twice: lm_head.weight, in model-") and twice.endswith(" and model.safetensors")


def test_matrices_in_fp8_are_listed_as_they_lie(tmp_path):
    shape = tiny_shape(num_layers=1, hidden_size=128, dense_ffn_size=128, expert_ffn_size=128, num_experts=2, experts_per_token=1, init_std=0.1)
    checkpoint = from_hf(write_hf_folder(tmp_path / "hf", shape, random_hf_weights(shape)), tmp_path / "checkpoints")
    to_hf(checkpoint, tmp_path / "fp8", fp8=True)
    found, held = inspect(tmp_path / "fp8", digests=True), load_file(tmp_path / "fp8/model.safetensors")
    assert found.odd == () and found.totals()["FP8 factors"][0] > 0
    assert {entry.name: (entry.dtype, entry.digest) for entry in found.entries} == {
        name: (str(tensor.dtype).removeprefix("torch."), tensor_digest(tensor)) for name, tensor in held.items()
    }


def test_a_changed_byte_is_told_on_both_sides(tmp_path, exported, checkpoint):
    made = tmp_path / "export"
    made.mkdir()
    for path in exported.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    file = sorted(made.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name].view(torch.int32).view(-1)[0] ^= 1
    save_file(tensors, file, {"format": "pt"})
    assert f"other bytes than the manifest says: {name}" in inspect(made, digests=True).odd

    copy = tmp_path / "step"
    copy.mkdir()
    for path in (path for path in checkpoint.rglob("*") if path.is_file()):
        (copy / path.relative_to(checkpoint)).parent.mkdir(exist_ok=True)
        (copy / path.relative_to(checkpoint)).write_bytes(path.read_bytes())
    item = torch_dist.tensors(copy)["decoder.final_layernorm.weight"].chunks[0]
    data = bytearray((copy / item.file).read_bytes())
    data[torch_dist.data_offset(copy, item)] ^= 1
    (copy / item.file).write_bytes(data)
    assert inspect(copy).odd == ()
    (told,) = inspect(copy, digests=True).odd
    assert "decoder.final_layernorm.weight" in told and "sha256" in told
    assert inspect(copy, "*.router.*", digests=True).odd == (), "what was not asked for is not read"


def test_a_folder_of_checkpoints_means_the_newest(checkpoint):
    assert inspect(checkpoint.parent) == inspect(checkpoint)


def test_a_path_that_is_neither_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="neither config.json nor .metadata"):
        inspect(tmp_path)


def test_listing_opens_no_tensor(folder, checkpoint, monkeypatch):
    monkeypatch.setattr(inspection.Span, "blocks", lambda *_: pytest.fail("bytes were read"))
    monkeypatch.setattr("glm.weights.places.Place.read", lambda *_: pytest.fail("a tensor was read"))
    assert inspect(folder).entries and inspect(checkpoint).entries


def test_a_folder_of_the_released_size_is_listed_from_its_headers(tmp_path, capsys):
    """GLM-4.5-Air with 4.5's copies, its 221 GB being holes in the files."""
    shape = Model(
        num_layers=46, num_dense_layers=1, hidden_size=4096, dense_ffn_size=10944, expert_ffn_size=1408, num_attention_heads=96,
        num_query_groups=8, head_dim=128, qk_norm=False, num_experts=128, experts_per_token=8, routed_scaling_factor=1.0,
        num_mtp_layers=1, vocab_size=151552, max_position=131072,
    )
    (tmp_path / "config.json").write_text(json.dumps(config_json(shape, rotary_base=1_000_000, params="bf16")))
    header, end = {}, 0
    for name, size in hf_shapes(shape).items():
        kind, itemsize = ("F32", 4) if name.endswith("correction_bias") else ("BF16", 2)
        header[name] = {"dtype": kind, "shape": size, "data_offsets": [end, end + math.prod(size) * itemsize]}
        end = header[name]["data_offsets"][1]
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert command.main([str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert f"{109_227_304_960 + 5_888 + 2 * 620_756_992:,} numbers" in told and told.endswith("nothing odd\n")


def test_the_command_prints_a_line_a_tensor_totals_and_what_is_odd(capsys, exported, tmp_path):
    assert command.main([str(exported), "*.eh_proj.*"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].split()[:4] == ["model.layers.4.eh_proj.weight", "float32", "64x128", "32,768"]
    assert told[0].endswith(tensor_digest(WEIGHTS["model.layers.4.eh_proj.weight"])[:16])
    assert told[2].startswith(f"{exported}: Hugging Face folder") and "MTP" in told[3] and told[-1] == "  nothing odd"
    assert command.main([str(tmp_path)]) == 2
    assert "CheckpointError" in capsys.readouterr().err


def test_the_command_prints_json_without_megatron(checkpoint):
    program = (f"import sys\nfrom tools.convert import inspect\nstatus = inspect.main([{str(checkpoint)!r}, '--json'])\n"
               "assert 'megatron' not in sys.modules\nsys.exit(status)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kind"] == "checkpoint" and told["odd"] == [] and told["totals"]["experts"]["tensors"] == 6
    assert len(told["tensors"]) == len(rows(SHAPE))
