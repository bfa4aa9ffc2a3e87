"""Folders in every form that tools write them, and everything that can be wrong with one is refused with file and tensor."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm.errors import CheckpointError
from glm.weights.digest import tensor_digest
from glm.weights.hf_reader import HFFolder
from glm.weights.name_map import copies, hf_names
from tests.model_fixture import SHAPES, random_hf_weights, transformers_config, write_hf_folder

INDEX = "model.safetensors.index.json"


def stacked(shape, weights):
    """The experts of each layer in two tensors, as transformers 5 holds them, without the code under test."""
    tensors = {name: tensor for name, tensor in weights.items() if ".mlp.experts." not in name}
    for layer in range(shape.num_dense_layers, shape.num_layers + 1):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = ([weights[f"{prefix}.{e}.{kind}_proj.weight"] for e in range(shape.num_experts)] for kind in ("gate", "up", "down"))
        tensors[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up)])
        tensors[f"{prefix}.down_proj"] = torch.stack(down)
    return tensors


def sharded(folder, shape, tensors, files=5, seed=0):
    """Every tensor in a random file, whose names and order tell nothing of the layers."""
    draw = random.Random(seed)
    write_hf_folder(folder, shape, {})
    (folder / "model.safetensors").unlink()
    names = [f"model-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)]
    weight_map = {name: draw.choice(names) for name in draw.sample(sorted(tensors), len(tensors))}
    for file in names:
        held = {name: tensors[name].contiguous() for name in weight_map if weight_map[name] == file}
        save_file(held, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module", params=SHAPES)
def model(request):
    return SHAPES[request.param], random_hf_weights(SHAPES[request.param])


@pytest.mark.parametrize("experts", ["each on its own", "stacked"])
@pytest.mark.parametrize("files", ["one file", "shards"])
@pytest.mark.parametrize("duplicates", ["as 4.5", "as 4.6"])
def test_every_form_gives_the_same_tensors(tmp_path, model, experts, files, duplicates):
    shape, weights = model
    tensors = dict(weights) if duplicates == "as 4.6" else weights | {c: weights[o].clone() for c, o in copies(shape).items()}
    tensors = stacked(shape, tensors) if experts == "stacked" else tensors
    read = HFFolder((write_hf_folder if files == "one file" else sharded)(tmp_path / "hf", shape, tensors))
    assert set(read.names) == {*hf_names(shape), *(copies(shape) if duplicates == "as 4.5" else ())}
    read.check_copies()
    for name, tensor in weights.items():
        place = read.place(name)
        assert torch.equal(read.get(name), tensor) and place.shape == tensor.shape and place.nbytes == tensor.nbytes, name
        with place.path.open("rb") as file:
            file.seek(place.offset)
            assert file.read(place.nbytes) == tensor.numpy().tobytes(), name


def test_stacked_experts_are_how_transformers_holds_them():
    """That it holds [E, 2F, H], gate above up, and [E, H, F]."""
    from transformers import Glm4MoeForCausalLM

    shape = SHAPES["odd"]
    held = Glm4MoeForCausalLM(transformers_config(shape)).state_dict()
    ours = stacked(shape, random_hf_weights(shape))
    last = f"model.layers.{shape.num_layers}."
    assert {name: tensor.shape for name, tensor in held.items()} == {
        name: tensor.shape for name, tensor in ours.items() if not name.startswith(last)
    }


def test_a_stack_of_another_shape_and_an_expert_that_stands_twice_are_named(tmp_path, model):
    shape, weights = model
    name = f"model.layers.{shape.num_layers}.mlp.experts"
    for change, words in (
        ({f"{name}.down_proj": torch.zeros(shape.num_experts, 3, 5)}, r"down_proj\n.*shape \[\d+, 3, 5\]"),
        ({f"{name}.1.up_proj.weight": weights[f"{name}.1.up_proj.weight"]}, r"1\.up_proj\.weight.*\n.*each expert once"),
    ):
        tensors = stacked(shape, weights) | change
        with pytest.raises(CheckpointError, match=words):
            HFFolder(write_hf_folder(tmp_path / "hf", shape, tensors))


SHAPE = SHAPES["355b"]


@pytest.fixture(scope="module")
def weights():
    return random_hf_weights(SHAPE)


@pytest.fixture
def folder(tmp_path, weights):
    return sharded(tmp_path / "hf", SHAPE, weights)


def index_of(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


NAME = "model.layers.4.mlp.experts.3.up_proj.weight"
NAME_ = NAME.replace(".", r"\.")


def cut(folder, file):
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(folder, file):
    file.write_bytes(file.read_bytes() + b"\0" * 64)


def garbage(folder, file):
    file.write_bytes(file.read_bytes()[:8] + b"\xfe" * (file.stat().st_size - 8))


def page_of_html(folder, file):
    file.write_text("<html>503 Service Unavailable</html>")


def remove_file(folder, file):
    file.unlink()


def remove_tensor(folder, file):
    rewrite(file, lambda tensors: tensors.pop(NAME))


def remove_everywhere(folder, file):
    remove_tensor(folder, file)
    index = index_of(folder)
    del index[NAME]
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))


def in_two_files(folder, file):
    other = next(folder / name for name in set(index_of(folder).values()) if name != file.name)
    rewrite(other, lambda tensors: tensors.update({NAME: torch.zeros(32, 64)}))


def not_in_the_index(folder, file):
    rewrite(file, lambda tensors: tensors.update({"model.layers.4.mlp.experts.8.up_proj.weight": torch.zeros(32, 64)}))


def transposed(folder, file):
    rewrite(file, lambda tensors: tensors.update({NAME: tensors[NAME].T.contiguous()}))


def integers(folder, file):
    rewrite(file, lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.int8)}))


def index_leads_outside(folder, file):
    (folder / INDEX).write_text(json.dumps({"weight_map": index_of(folder) | {NAME: "../elsewhere.safetensors"}}))


def index_is_cut(folder, file):
    (folder / INDEX).write_text((folder / INDEX).read_text()[:-30])


def index_without_a_map(folder, file):
    (folder / INDEX).write_text("{}")


def no_index(folder, file):
    (folder / INDEX).unlink()


def another_model(folder, file):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v3"}))


def one_expert_less(folder, file):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_routed_experts": 7}))


@pytest.mark.parametrize(("change", "words"), [
    (cut, "FILE\n.*bytes\n.*bytes, which the tensors"), (lengthen, "FILE\n.*bytes\n.*bytes, which the tensors"),
    (garbage, "FILE\n.*header"), (page_of_html, "FILE\n.*header"), (remove_file, "FILE\n.*no such file"),
    (remove_tensor, f"FILE: {NAME_}\n.*no such tensor"), (remove_everywhere, f"missing: {NAME_}"),
    (in_two_files, f"safetensors: {NAME_}\n.* has it (too|in model-)"),
    (not_in_the_index, r"FILE: model\.layers\.4\.mlp\.experts\.8\.up_proj\.weight\n.*has it nowhere"),
    (transposed, rf"FILE: {NAME_}\n.*shape \[64, 32\]\n.*shape \[32, 64\]"), (integers, f"FILE: {NAME_}\n.*int8"),
    (index_leads_outside, r"elsewhere\.safetensors\n.*no such file"), (index_is_cut, f"{INDEX}\n"),
    (index_without_a_map, f"{INDEX}\n.*weight_map"), (no_index, r"model\.safetensors\n.*no such file\n.*or model\.safetensors\.index"),
    (another_model, r"config\.json: model_type\n.*deepseek_v3.*\n.*glm4_moe"), (one_expert_less, r"without a partner: model\.layers\.1\.mlp\.experts\.7"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_wrong_with_a_folder_is_told_with_file_and_tensor(folder, change, words):
    file = folder / index_of(folder)[NAME]
    change(folder, file)
    with pytest.raises(CheckpointError, match=words.replace("FILE", file.name)):
        HFFolder(folder)


def test_a_flipped_bit_is_found_by_the_digest_of_its_tensor(folder, weights):
    manifest = {name: {"sha256": tensor_digest(tensor)} for name, tensor in weights.items()}
    (folder / "manifest.json").write_text(json.dumps({"tensors": manifest}))
    place = HFFolder(folder).place(NAME)
    with place.path.open("r+b") as file:
        file.seek(place.offset + place.nbytes - 1)
        last = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([last[0] ^ 0x40]))
    read = HFFolder(folder)
    read.get("lm_head.weight")
    with pytest.raises(CheckpointError, match=f"{place.path.name}: {NAME_}\n.*other bytes"):
        read.get(NAME)
    with pytest.raises(CheckpointError, match=NAME_):
        read.check_digest(NAME, place.digest())


def test_a_manifest_that_is_cut_is_told(folder):
    (folder / "manifest.json").write_text('{"tensors": {')
    with pytest.raises(CheckpointError, match="manifest.json"):
        HFFolder(folder)


def test_comparing_the_copies_holds_neither(tmp_path, weights, monkeypatch):
    tensors = weights | {copy: weights[original].clone() for copy, original in copies(SHAPE).items()}
    read = HFFolder(write_hf_folder(tmp_path / "hf", SHAPE, tensors))
    monkeypatch.setattr("glm.weights.places.Place.read", lambda self: pytest.fail(f"{self} was loaded"))
    read.check_copies()
