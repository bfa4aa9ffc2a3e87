"""What lies beside the weights comes back byte for byte, of base and of chat models, and config.json stays true."""

import json

import pytest

from glm.errors import CheckpointError
from glm.weights.companions import CARRIED, carry_companions, companions, restore_companions
from glm.weights.fp8 import fp8_plan
from glm.weights.hf_config import config_json, model_section
from tests.model_fixture import tiny_shape

SHAPE = tiny_shape()
FILES = {
    "generation_config.json": '{"eos_token_id": [1, 2, 3],\n "temperature": 0.6}\n', "chat_template.jinja": "[gMASK]<sop>{% for … %}",
    "tokenizer.json": '{"model": {"vocab": {"ü": 1}}}', "tokenizer_config.json": "{}", "special_tokens_map.json": "{ }", "merges.txt": "a b\n",
    "vocab.json": '{"a": 0}', "added_tokens.json": "{}", "README.md": "# A model", "LICENSE": "MIT",
}


def base() -> dict:
    return config_json(SHAPE, rotary_base=1_000_000, params="bf16") | {"eos_token_id": 151329, "transformers_version": "4.54.0.dev0"}


def chat() -> dict:
    """As the released chat models have it: a list of ids, no "dtype", keys in their own order."""
    config = base() | {"eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329, "head_dim": SHAPE.head_dim}
    del config["dtype"], config["rope_parameters"]
    return dict(reversed(config.items()))


@pytest.fixture(params=[base, chat], ids=["base", "chat"])
def folder(tmp_path, request):
    made = tmp_path / "source"
    made.mkdir()
    for name, text in FILES.items():
        (made / name).write_text(text, encoding="utf-8")
    (made / "config.json").write_text(json.dumps(request.param(), indent=4) + "\n\n")
    for other in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "manifest.json", "pytorch_model.bin", ".gitattributes"):
        (made / other).write_bytes(b"x")
    (made / "figures").mkdir()
    return made


@pytest.fixture
def checkpoint(tmp_path, folder):
    (tmp_path / "step").mkdir()
    carry_companions(folder, tmp_path / "step")
    return tmp_path / "step"


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def restored(checkpoint, out, shape=SHAPE, rotary_base=1_000_000, params="bf16", **options) -> dict:
    assert restore_companions(checkpoint, out, shape, rotary_base=rotary_base, params=params, **options)
    return json.loads((out / "config.json").read_text())


def test_all_but_the_weights_is_carried_and_comes_back_byte_for_byte(folder, checkpoint, out):
    names = {*FILES, "config.json"}
    assert {path.name for path in companions(folder)} == names == {path.name for path in (checkpoint / CARRIED).iterdir()}
    restored(checkpoint, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {name: (folder / name).read_bytes() for name in names}


def test_a_link_of_a_download_cache_is_carried_as_a_file(tmp_path, folder):
    (tmp_path / "blob").write_text("{}")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(tmp_path / "blob")
    carry_companions(folder, tmp_path / "step")
    carried = tmp_path / "step" / CARRIED / "tokenizer.json"
    assert carried.read_text() == "{}" and not carried.is_symlink()


def test_another_type_of_the_weights_changes_config_json_and_nothing_else(folder, checkpoint, out):
    original = json.loads((folder / "config.json").read_text())
    types = {key: "float32" for key in ("dtype", "torch_dtype") if key in original}
    assert types and restored(checkpoint, out, params="fp32") == original | types


def test_quantisation_is_told_and_taken_back(tmp_path, folder, checkpoint, out):
    quantised = fp8_plan(SHAPE).config
    original = json.loads((folder / "config.json").read_text())
    assert restored(checkpoint, out, quantization_config=quantised) == original | {"quantization_config": quantised}
    carry_companions(out, tmp_path / "again")
    (tmp_path / "plain").mkdir()
    assert restored(tmp_path / "again", tmp_path / "plain") == original


@pytest.mark.parametrize("change", [{"rotary_base": 10_000}, {"shape": tiny_shape(max_position=1024)}])
def test_a_model_that_training_changed_gets_a_true_configuration(folder, checkpoint, out, change):
    original, config = json.loads((folder / "config.json").read_text()), restored(checkpoint, out, **change)
    assert model_section(config) == change.get("shape", SHAPE) and config["rope_theta"] == change.get("rotary_base", 1_000_000)
    assert config["eos_token_id"] == original["eos_token_id"] and config["transformers_version"] == "4.54.0.dev0"


def test_a_checkpoint_that_never_was_a_folder_has_nothing_to_bring_back(tmp_path, out):
    assert not restore_companions(tmp_path, out, SHAPE, rotary_base=10_000, params="bf16") and not list(out.iterdir())


def test_a_carried_configuration_that_was_cut_is_told(checkpoint, out):
    config = checkpoint / CARRIED / "config.json"
    config.write_text(config.read_text()[:-9])
    with pytest.raises(CheckpointError, match="hf/config.json"):
        restored(checkpoint, out)
