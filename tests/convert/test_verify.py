"""What verification sees: every tensor by its bytes, both manifests, and faults that rounding or a missing digest would hide."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm.checkpoint import manifest, torch_dist
from glm.checkpoint.run_folder import write_json
from glm.convert import verify as verification
from glm.convert.differences import compare
from glm.convert.from_hf import from_hf
from glm.convert.to_hf import to_hf
from glm.convert.verify import verify
from glm.errors import CheckpointError
from glm.weights.hf_reader import HFFolder
from tests.model_fixture import random_hf_weights, tiny_shape, write_hf_folder
from tools.convert import verify as verify_command

ROOT = Path(__file__).resolve().parents[2]
SHAPE = tiny_shape(init_std=0.1)
ROUTER = ("mlp.gate.weight", "e_score_correction_bias")


def halved(weights: dict) -> dict:
    """A bfloat16 model after training: its routers are float32 and hold values that bfloat16 does not."""
    return {name: tensor if name.endswith(ROUTER) else tensor.bfloat16() for name, tensor in weights.items()}


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def pair(request, tmp_path_factory):
    """(checkpoint, its export)."""
    root, weights = tmp_path_factory.mktemp(request.param), random_hf_weights(SHAPE)
    if request.param == "bf16":
        weights = halved(weights)
    checkpoint = from_hf(write_hf_folder(root / "hf", SHAPE, weights), root / "checkpoints")
    assert manifest.stored_params(checkpoint) == request.param
    to_hf(checkpoint, root / "export")
    return checkpoint, root / "export"


def changed(folder: Path, target: Path, change, *, keep_manifest: bool = False) -> Path:
    """A copy of ``folder`` (one file of weights) whose tensors went through ``change``."""
    target.mkdir()
    for path in folder.iterdir():
        if keep_manifest or path.name != "manifest.json":
            (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_an_export_and_its_checkpoint_verify_with_logits_and_both_manifests(pair):
    found = verify(*pair)
    assert found.tensors == 181 and found.digests and found.quantised == 0
    assert found.max_logit_difference < 1e-5 and found.mtp_loss_difference < 1e-5 and found.max_logit > 1
    assert found.bytes == sum(tensor.nbytes for tensor in load_file(pair[1] / "model.safetensors").values())


def test_routers_that_were_rounded_are_found(pair, tmp_path):
    name = "model.layers.2.mlp.gate.weight"

    def round_router(tensors):
        tensors[name] = tensors[name].bfloat16()

    other = changed(pair[1], tmp_path / "export", round_router)
    with pytest.raises(CheckpointError, match=rf"1 of 181 tensors differ, most: {name} by "):
        verify(pair[0], other, logits=False)


@pytest.mark.parametrize("name", [
    "model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.bias", "model.layers.3.self_attn.v_proj.weight",
    "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.experts.7.gate_proj.weight", "model.layers.4.mlp.experts.0.down_proj.weight",
    "model.layers.4.mlp.gate.e_score_correction_bias", "model.layers.4.eh_proj.weight", "model.norm.weight",
])
def test_the_last_bit_of_any_tensor_is_found(pair, tmp_path, name):
    def flip(tensors):
        bits = tensors[name].view(torch.int32 if tensors[name].dtype is torch.float32 else torch.int16)
        bits.view(-1)[-1] ^= 1

    other = changed(pair[1], tmp_path / "export", flip)
    with pytest.raises(CheckpointError, match=rf"1 of 181 tensors differ, most: {name} by "):
        verify(pair[0], other, logits=False)
    assert compare(pair[0], HFFolder(other)).differing.keys() == {name}


def test_minus_zero_and_not_a_number_are_differences(pair, tmp_path):
    names = ["model.layers.1.input_layernorm.weight", "model.layers.2.input_layernorm.weight"]

    def spoil(tensors):
        tensors[names[0]][5] = float("nan")
        tensors[names[1]][5] = -0.0

    other = changed(pair[1], tmp_path / "export", spoil)
    differing = compare(pair[0], HFFolder(other)).differing
    assert differing.keys() == set(names) and differing[names[0]] == float("inf")


def test_a_change_that_the_folders_manifest_tells_of_is_named_so(pair, tmp_path):
    other = changed(pair[1], tmp_path / "export", lambda tensors: tensors["model.norm.weight"].add_(1), keep_manifest=True)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight\n.*other bytes than when it was written"):
        verify(pair[0], other, logits=False)


@pytest.mark.parametrize("digests", [True, False])
def test_a_flipped_bit_in_the_checkpoint_is_named_with_and_without_digests(tmp_path, digests):
    folder = write_hf_folder(tmp_path / "hf", SHAPE, random_hf_weights(SHAPE))
    checkpoint = from_hf(folder, tmp_path / "checkpoints", digests=digests)
    item = torch_dist.tensors(checkpoint)["decoder.layers.2.mlp.router.weight"].chunks[0]
    with (checkpoint / item.file).open("r+b") as file:
        file.seek(torch_dist.data_offset(checkpoint, item) + 6)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    words = r"decoder\.layers\.2\.mlp\.router\.weight.*\n.*sha256" if digests else r"1 of 181 tensors differ, most: model\.layers\.2\.mlp\.gate\.weight"
    with pytest.raises(CheckpointError, match=words):
        verify(checkpoint, folder, logits=False)


def test_a_result_says_when_a_side_has_no_digests(tmp_path, capsys):
    folder = write_hf_folder(tmp_path / "hf", SHAPE, random_hf_weights(SHAPE))
    checkpoint = from_hf(folder, tmp_path / "checkpoints")
    assert not verify(checkpoint, folder, logits=False).digests
    assert verify_command.main([str(checkpoint), str(folder), "--no-logits"]) == 0
    assert "181 tensors" in (told := capsys.readouterr().out) and "without digests" in told and "logits not compared" in told


def test_an_mtp_loss_that_is_no_number_does_not_pass(pair, monkeypatch):
    monkeypatch.setattr(verification, "mtp_loss", lambda *_: float("nan"))
    with pytest.raises(CheckpointError, match="the MTP loss by nan"):
        verify(*pair)


def test_a_difference_only_one_program_sees_fails(pair, tmp_path):
    """Equal tensors, but config.json tells transformers another epsilon; ours reads it from the checkpoint."""
    other = changed(pair[1], tmp_path / "export", lambda tensors: None)
    config = json.loads((other / "config.json").read_text())
    write_json(other / "config.json", config | {"rms_norm_eps": 1e-2})
    with pytest.raises(CheckpointError, match="norm_epsilon 0.01"):
        verify(pair[0], other)


PEAK = """
import resource, sys
from pathlib import Path
from glm.convert.verify import verify
from glm.convert.differences import compare
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
verify(Path(sys.argv[1]), Path(sys.argv[2]), logits=False)
assert not {"transformers", "megatron"} & set(sys.modules), "tensors were to be compared without models"
print((peak() - before) * 1024)
"""


def test_comparing_tensors_takes_little_memory_and_no_model(tmp_path):
    shape = tiny_shape(num_layers=1, num_dense_layers=0, hidden_size=256, vocab_size=40_000, num_experts=2, experts_per_token=1)
    folder = write_hf_folder(tmp_path / "hf", shape, random_hf_weights(shape), initializer_range=0.02)
    checkpoint = from_hf(folder, tmp_path / "checkpoints")
    done = subprocess.run([sys.executable, "-c", PEAK, str(checkpoint), str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    largest = shape.vocab_size * shape.hidden_size * 4
    assert int(done.stdout) < largest / 2, f"{int(done.stdout):,} bytes for a largest tensor of {largest:,}"
