"""What is wrong with a source is told with the tensor and the file, and nothing that looks whole is left."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm.checkpoint import manifest, torch_dist
from glm.checkpoint.run_folder import write_json
from glm.checkpoint.torch_dist import Stored
from glm.convert.from_hf import from_hf
from glm.convert.to_hf import to_hf
from glm.errors import CheckpointError
from glm.weights.places import safetensors_places
from tests.model_fixture import random_hf_weights, tiny_shape, write_hf_folder
from tools.convert import from_hf as from_hf_command

SHAPE = tiny_shape()
DOWN = "model.layers.3.mlp.experts.5.down_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_hf_folder(tmp_path_factory.mktemp("hf"), SHAPE, random_hf_weights(SHAPE))


@pytest.fixture(scope="module")
def imported(tmp_path_factory, source):
    return from_hf(source, tmp_path_factory.mktemp("imported"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, imported):
    to_hf(imported, tmp_path_factory.mktemp("exported") / "out")
    return next(tmp_path_factory.getbasetemp().glob("exported*/out"))


@pytest.fixture
def checkpoint(tmp_path, imported):
    return Path(shutil.copytree(imported, tmp_path / "ck"))


@pytest.fixture
def folder(tmp_path, exported):
    """With a manifest."""
    return Path(shutil.copytree(exported, tmp_path / "hf"))


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 4]))


def refuses_export(checkpoint: Path, tmp_path: Path, words: str) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=words):
        to_hf(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "a refused export leaves nothing"


def refuses_import(folder: Path, tmp_path: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        from_hf(folder, tmp_path / "made")
    assert not (tmp_path / "made").exists() or list((tmp_path / "made").iterdir()) == [], "a refused import leaves nothing"


def test_a_flipped_bit_in_a_safetensors_file_is_told_with_the_tensor(tmp_path, folder):
    place = safetensors_places(folder / "model.safetensors")[DOWN]
    flip(place.path, place.offset + 1234)
    refuses_import(folder, tmp_path, rf"model\.safetensors: {DOWN}\n.*other bytes than when it was written")


def test_a_flipped_bit_in_a_checkpoint_is_told_with_the_tensor(tmp_path, checkpoint):
    (chunk,) = torch_dist.tensors(checkpoint)["decoder.layers.2.mlp.router.weight"].chunks
    flip(checkpoint / chunk.file, torch_dist.data_offset(checkpoint, chunk) + 99)
    words = r"__0_0\.distcp: decoder\.layers\.2\.mlp\.router\.weight\[0, 0\]\n.*sha256"
    refuses_export(checkpoint, tmp_path, words)
    with pytest.raises(CheckpointError, match=words):
        manifest.verify(checkpoint)


@pytest.mark.parametrize("name", [".metadata", "hf/config.json"])
def test_a_flipped_bit_in_a_checkpoints_description_is_told_with_the_file(tmp_path, checkpoint, name):
    flip(checkpoint / name, 300)
    refuses_export(checkpoint, tmp_path, rf"{name}\n.*sha256")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
@pytest.mark.parametrize(("damage", "words"), [
    (lambda path: path.unlink(), "no such file"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "bytes\n.*bytes"),
])
def test_a_missing_or_cut_file_of_a_checkpoint_is_named(tmp_path, checkpoint, name, damage, words):
    damage(checkpoint / name)
    refuses_export(checkpoint, tmp_path, rf"{name}\n.*{words}")


def test_a_cut_shard_is_named(tmp_path, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refuses_import(folder, tmp_path, "model.safetensors")


@pytest.mark.parametrize(("change", "words"), [
    (lambda w: w.pop(DOWN), rf"missing: {DOWN}"),
    (lambda w: w.update({"model.layers.5.enorm.weight": torch.ones(64)}), r"without a partner: model\.layers\.5\.enorm\.weight"),
    (lambda w: w.update({DOWN: w[DOWN].T.contiguous()}), rf"{DOWN}\n.*shape \[32, 64\]\n.*shape \[64, 32\]"),
])
def test_missing_extra_and_misshapen_tensors_of_a_folder_are_named(tmp_path, source, change, words):
    weights = load_file(source / "model.safetensors")
    change(weights)
    refuses_import(write_hf_folder(tmp_path / "hf", SHAPE, weights), tmp_path, words)


def without_digests(checkpoint: Path) -> None:
    """So that a change is found for what it is, not as a digest that differs."""
    told = manifest.read_manifest(checkpoint)
    files = {name: {"bytes": (checkpoint / name).stat().st_size} for name in told["files"]}
    write_json(checkpoint / "manifest.json", told | {"files": files})


def rewritten(checkpoint: Path, change) -> None:
    stored = torch_dist.tensors(checkpoint)
    change(stored)
    torch_dist.write_metadata(checkpoint, stored)
    without_digests(checkpoint)


ROUTER, DOWN_STACK, EMBEDDING = "decoder.layers.2.mlp.router.weight", "decoder.layers.3.mlp.experts.weight2", "embedding.word_embeddings.weight"


@pytest.mark.parametrize(("change", "words"), [
    (lambda s: s.pop(DOWN_STACK), rf"missing: {DOWN_STACK}"),
    (lambda s: s.update({"decoder.layers.9.x": Stored(torch.float32, (8, 64), tuple(replace(c, key="decoder.layers.9.x") for c in s[ROUTER].chunks))}),
     r"without a partner: decoder\.layers\.9\.x"),
    (lambda s: s.update({ROUTER: Stored(torch.float32, (4, 64), s[ROUTER].chunks)}), rf"{ROUTER}\n.*\[4, 64\]\n.*\[8, 64\]"),
    (lambda s: s.update({ROUTER: Stored(torch.float16, (8, 64), s[ROUTER].chunks)}), rf"{ROUTER}\n.*float16"),
    (lambda s: s.update({EMBEDDING: Stored(torch.float32, (200, 64), s[EMBEDDING].chunks)}), rf"{EMBEDDING}\n.*\[200, 64\]"),
    (lambda s: s.update({DOWN_STACK: Stored(torch.float32, (8, 64, 32), ())}), rf"{DOWN_STACK}\n.*rows 0 to 64 of expert 0 in chunks with columns \[\]"),
    (lambda s: s.update({ROUTER: Stored(torch.float32, (8, 64), s[ROUTER].chunks * 2)}), "chunks"),
])
def test_missing_extra_misshapen_and_uncovered_tensors_of_a_checkpoint_are_named(tmp_path, checkpoint, change, words):
    """Never a silent zero: rows that no chunk holds are an error."""
    rewritten(checkpoint, change)
    refuses_export(checkpoint, tmp_path, words)


def test_an_item_that_is_not_the_tensor_its_index_promises_is_named(tmp_path, checkpoint):
    def change(stored):
        a, b = (stored[f"decoder.layers.{layer}.mlp.router.weight"].chunks[0] for layer in (1, 2))
        swapped = [replace(a, offset=b.offset - 64)]
        stored[a.key] = Stored(torch.float32, (8, 64), tuple(swapped))

    rewritten(checkpoint, change)
    refuses_export(checkpoint, tmp_path, r"decoder\.layers\.1\.mlp\.router\.weight\[0, 0\]\n.*\n.*a stored tensor")


def test_a_metadata_file_that_names_a_function_is_not_run(tmp_path, checkpoint):
    (checkpoint / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    without_digests(checkpoint)
    refuses_export(checkpoint, tmp_path, r"\.metadata\n.*names (os|posix)\.system")


def test_a_folder_of_another_network_ends_the_command_with_its_name(tmp_path, source, capsys):
    folder = Path(shutil.copytree(source, tmp_path / "hf"))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "qwen3_moe"}
    (folder / "config.json").write_text(json.dumps(config))
    assert from_hf_command.main([str(folder), str(tmp_path / "made")]) == 2
    told = capsys.readouterr().err
    assert "model_type" in told and "qwen3_moe" in told and not (tmp_path / "made").exists()


def test_without_digests_nothing_pretends_to_be_verified(tmp_path, source):
    checkpoint = from_hf(source, tmp_path / "ck", digests=False)
    told = manifest.read_manifest(checkpoint)["files"]
    assert all(entry.keys() == {"bytes"} for entry in told.values()) and manifest.verify(checkpoint) is False
    (checkpoint / "__0_0.distcp").touch()
    with pytest.warns(UserWarning, match="written without digests"):
        to_hf(checkpoint, tmp_path / "out")
    with pytest.warns(UserWarning, match="written without digests"):
        from glm.checkpoint import store
        from glm.weights import one_rank

        one_rank.start(SHAPE, platform="host")
        store.load(checkpoint, [one_rank.build(SHAPE, rotary_base=10_000)])
    to_hf(from_hf(source, tmp_path / "proven"), tmp_path / "plain", digests=False)
    tensors = json.loads((tmp_path / "plain/manifest.json").read_text())["tensors"]
    assert len(tensors) == 181 and all(entry.keys() == {"dtype", "shape"} for entry in tensors.values())
    assert (tmp_path / "plain/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_an_export_without_digests_proves_nothing_of_what_it_reads(tmp_path, checkpoint):
    """What --no-digests saves is this proof: the flag says so, and this is its price."""
    (chunk,) = torch_dist.tensors(checkpoint)[ROUTER].chunks
    flip(checkpoint / chunk.file, torch_dist.data_offset(checkpoint, chunk) + 2)
    to_hf(checkpoint, tmp_path / "out", digests=False)
    with pytest.raises(CheckpointError, match="router"):
        to_hf(checkpoint, tmp_path / "proven")


def test_an_earlier_export_stays_until_the_new_one_is_whole(tmp_path, checkpoint, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (chunk,) = torch_dist.tensors(checkpoint)[ROUTER].chunks
    flip(checkpoint / chunk.file, torch_dist.data_offset(checkpoint, chunk))
    with pytest.raises(CheckpointError):
        to_hf(checkpoint, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, tmp_path / "else.safetensors")
    (tmp_path / "else").mkdir()
    (tmp_path / "else.safetensors").rename(tmp_path / "else/model.safetensors")
    with pytest.raises(CheckpointError, match="no earlier export"):
        to_hf(checkpoint, tmp_path / "else")
