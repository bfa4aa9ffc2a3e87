"""Folders are written whole, read lazily, and a torn, changed, missing or unknown tensor is told by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm.errors import CheckpointError, PlatformError
from glm.weights import hf_folder
from glm.weights.digest import tensor_digest
from glm.weights.hf_folder import write_folder
from glm.weights.hf_reader import HFFolder
from glm.weights.name_map import copies, hf_names
from tests.model_fixture import random_hf_weights, tiny_shape, write_hf_folder
from tests.tokenizer_fixture import write_tokenizer

SHAPE = tiny_shape()


@pytest.fixture(scope="module")
def weights():
    made = random_hf_weights(SHAPE)
    return {name: made[name] for name in hf_names(SHAPE)}


@pytest.fixture
def folder(tmp_path, weights):
    write_folder(tmp_path / "export", weights.items(), SHAPE, rotary_base=10_000, max_shard_bytes=100_000)
    return tmp_path / "export"


def test_what_is_written_is_read(folder, weights):
    read = HFFolder(folder)
    assert read.shape == SHAPE and read.rotary_base == 10_000 and read.params == "fp32"
    assert all(torch.equal(read.get(name), tensor) for name, tensor in weights.items())


def test_shards_stay_below_the_limit_and_the_index_names_them(folder, weights):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    held = {file: load_file(folder / file) for file in files}
    largest = max(tensor.nbytes for tensor in weights.values())
    assert all(sum(t.nbytes for t in tensors.values()) <= max(100_000, largest) for tensors in held.values())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    assert {path.name for path in folder.glob("*.safetensors")} == set(files)


def test_one_file_needs_no_index(tmp_path, weights):
    written = write_folder(tmp_path / "one", weights.items(), SHAPE, rotary_base=10_000)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"model.safetensors", "config.json", "generation_config.json", "manifest.json"}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (tmp_path / "one").iterdir()), "others can read it"
    assert (written.tensors, written.bytes) == (len(weights), sum(tensor.nbytes for tensor in weights.values()))


def test_the_manifest_digests_every_tensor(folder, weights):
    told = json.loads((folder / "manifest.json").read_text())["tensors"]
    assert {name: entry["sha256"] for name, entry in told.items()} == {name: tensor_digest(t) for name, t in weights.items()}


def test_a_digest_tells_type_shape_and_every_byte_but_not_memory_layout():
    tensor = torch.arange(6.0).reshape(2, 3)
    changed = tensor.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    others = [changed, tensor.reshape(3, 2), tensor.double(), -tensor, tensor.bfloat16()]
    assert len({tensor_digest(t) for t in [tensor, *others]}) == 6
    assert tensor_digest(tensor.T.contiguous().T) == tensor_digest(tensor)


def test_the_tokenizer_comes_along_and_gives_the_stop_tokens(tmp_path, weights):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", SHAPE.vocab_size)
    write_folder(tmp_path / "export", weights.items(), SHAPE, rotary_base=10_000, tokenizer=tmp_path / "tokenizer")
    config = json.loads((tmp_path / "export/config.json").read_text())
    generation = json.loads((tmp_path / "export/generation_config.json").read_text())
    stop = [tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    assert config["eos_token_id"] == generation["eos_token_id"] == stop and config["pad_token_id"] == stop[0]
    assert (tmp_path / "export/tokenizer.json").read_bytes() == (tmp_path / "tokenizer/tokenizer.json").read_bytes()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, weights):
    write_tokenizer(tmp_path / "tokenizer", SHAPE.vocab_size + 1)
    with pytest.raises(CheckpointError, match="321 tokens"):
        write_folder(tmp_path / "export", weights.items(), SHAPE, rotary_base=10_000, tokenizer=tmp_path / "tokenizer")
    assert not (tmp_path / "export").exists()


def test_a_failed_export_leaves_the_earlier_one_and_nothing_else(folder, weights, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="missing: lm_head.weight"):
        write_folder(folder, [(n, t) for n, t in weights.items() if n != "lm_head.weight"], SHAPE, rotary_base=10_000)
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(hf_folder, "save_file", full)
    with pytest.raises(PlatformError, match="No space left"):
        write_folder(folder, weights.items(), SHAPE, rotary_base=10_000)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_earlier_export_is_replaced_and_a_folder_of_something_else_is_not(folder, weights):
    write_folder(folder, weights.items(), SHAPE, rotary_base=20_000)
    read = HFFolder(folder)
    assert read.rotary_base == 20_000
    assert not list(folder.glob("model-*"))
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no earlier export"):
        write_folder(folder, weights.items(), SHAPE, rotary_base=30_000)


def test_a_torn_file_is_named(folder):
    path = sorted(folder.glob("model-*"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=path.name):
        HFFolder(folder)


def test_a_missing_file_is_named(folder):
    path = sorted(folder.glob("model-*"))[1]
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path.name}\n.*no such file"):
        HFFolder(folder)


def test_a_flipped_bit_is_told_with_the_tensor(folder):
    name = "model.layers.3.mlp.experts.5.down_proj.weight"
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name].view(torch.int32)[0, 0] ^= 1
    save_file(tensors, file)
    read = HFFolder(folder)
    read.get("model.norm.weight")
    with pytest.raises(CheckpointError, match=name):
        read.get(name)


@pytest.mark.parametrize(("change", "words"), [
    (lambda w: w.pop("model.layers.4.eh_proj.weight"), r"missing: model\.layers\.4\.eh_proj\.weight"),
    (lambda w: w.pop("model.layers.2.mlp.gate.e_score_correction_bias"), r"missing: model\.layers\.2\.mlp\.gate\.e_score_correction_bias"),
    (lambda w: w.update({"model.layers.5.enorm.weight": torch.ones(64)}), r"without a partner: model\.layers\.5\.enorm\.weight"),
    (lambda w: w.update({"lm_head.weight": w["lm_head.weight"].half()}), r"lm_head\.weight\n.*float16"),
])
def test_missing_unknown_and_unsupported_tensors_are_named(tmp_path, weights, change, words):
    changed = dict(weights)
    change(changed)
    with pytest.raises(CheckpointError, match=words):
        HFFolder(write_hf_folder(tmp_path / "hf", SHAPE, changed))


def test_copies_in_the_mtp_layer_must_equal_the_trunk(tmp_path, weights):
    originals = {copy: weights[original].clone() for copy, original in copies(SHAPE).items()}
    read = HFFolder(write_hf_folder(tmp_path / "same", SHAPE, weights | originals))
    read.check_copies()
    originals["model.layers.4.shared_head.head.weight"][3, 3] += 1e-3
    read = HFFolder(write_hf_folder(tmp_path / "other", SHAPE, weights | originals))
    with pytest.raises(CheckpointError, match=r"model\.layers\.4\.shared_head\.head\.weight\n.*differs from lm_head\.weight"):
        read.check_copies()


def test_copies_are_written_on_request(tmp_path, weights):
    write_folder(tmp_path / "export", weights.items(), SHAPE, rotary_base=10_000, with_copies=True)
    read = HFFolder(tmp_path / "export")
    assert set(read.names) == {*weights, *copies(SHAPE)}
    read.check_copies()


def test_a_bfloat16_folder_with_float32_router_biases_is_bfloat16(tmp_path, weights):
    rounded = {name: tensor if name.endswith("_bias") else tensor.bfloat16() for name, tensor in weights.items()}
    write_folder(tmp_path / "export", rounded.items(), SHAPE, rotary_base=10_000)
    assert json.loads((tmp_path / "export/config.json").read_text())["dtype"] == "bfloat16"
    read = HFFolder(tmp_path / "export")
    assert read.params == "bf16" and read.get("model.layers.1.mlp.gate.e_score_correction_bias").dtype is torch.float32
