"""Disks, processes and sources that fail at the worst moment: nothing finished is lost, nothing lost is taken for finished."""

import errno
import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from glm.checkpoint import manifest, torch_dist
from glm.checkpoint.run_folder import write_json
from glm.checkpoint.torch_dist import Stored
from glm.convert import draft as drafts, pieces
from glm.convert.from_hf import from_hf
from glm.convert.to_hf import to_hf
from glm.errors import CheckpointError, NumericsError, PlatformError
from glm.weights import hf_folder
from glm.weights.hf_reader import HFFolder
from tests.model_fixture import random_hf_weights, tiny_shape, write_hf_folder

SHAPE = tiny_shape()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hf_folder(tmp_path_factory.mktemp("hf"), SHAPE, random_hf_weights(SHAPE))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, folder):
    return from_hf(folder, tmp_path_factory.mktemp("imported"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def counted_writes(monkeypatch) -> list[str]:
    """The parts of the journal's pieces that are written from now on."""
    written, real = [], pieces._write

    def write(folder, part, *rest):
        written.append(part.file)
        return real(folder, part, *rest)

    monkeypatch.setattr(pieces, "_write", write)
    return written


def test_bytes_that_a_failed_flush_lost_are_written_again(tmp_path, folder, checkpoint, monkeypatch):
    """As Linux does it: the failure is told once, the pages are gone, and the next flush of the same file finds all well."""
    real, failed = drafts.sync, []

    def sync(path):
        if path.suffix == ".distcp" and not failed:
            failed.append(path)
            path.write_bytes(bytes(path.stat().st_size))
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path)

    monkeypatch.setattr(drafts, "sync", sync)
    monkeypatch.setattr(pieces, "COMMIT_BYTES", 100_000)
    with pytest.raises(ValueError, match="No space left"):
        from_hf(folder, tmp_path)
    assert failed
    assert contents(from_hf(folder, tmp_path)) == contents(checkpoint)


def test_a_checkpoint_is_never_taken_for_an_earlier_export(tmp_path, folder, checkpoint):
    other = from_hf(folder, tmp_path / "run/stages/sft/checkpoints")
    before = contents(other)
    with pytest.raises(CheckpointError, match="no earlier export"):
        to_hf(checkpoint, other)
    with pytest.raises(CheckpointError, match="no earlier export"):
        to_hf(tmp_path / "run/stages/sft/checkpoints", other)
    with pytest.raises(CheckpointError, match="apart from what is exported"):
        to_hf(other, other / "export")
    (tmp_path / "link").symlink_to(other)
    with pytest.raises(CheckpointError, match="apart from what is exported"):
        to_hf(other, tmp_path / "link/export")
    assert contents(other) == before
    assert sorted(path.name for path in other.parent.iterdir()) == ["step_00000000"]


def test_a_finished_draft_is_not_begun_anew_by_a_second_process(tmp_path, folder, checkpoint, monkeypatch):
    real, told = drafts.Draft.complete, []

    def complete(draft):
        real(draft)
        with pytest.raises(CheckpointError, match="another process is writing it") as refused:
            from_hf(folder, tmp_path)
        told.append(refused.value)

    monkeypatch.setattr(drafts.Draft, "complete", complete)
    made = from_hf(folder, tmp_path)
    assert len(told) == 1 and contents(made) == contents(checkpoint)


@pytest.mark.parametrize("command", ["from_hf", "to_hf"])
def test_a_kill_before_publishing_costs_nothing(tmp_path, folder, checkpoint, monkeypatch, command):
    def convert(name: str) -> Path:
        return from_hf(folder, tmp_path / name) if command == "from_hf" else to_hf(checkpoint, tmp_path / name) and tmp_path / name

    def killed(draft):
        complete(draft)
        raise KeyboardInterrupt

    complete = drafts.Draft.complete
    with monkeypatch.context() as patch:
        patch.setattr(drafts.Draft, "complete", killed)
        with pytest.raises(KeyboardInterrupt):
            convert("killed")
    written = counted_writes(monkeypatch)
    again = convert("killed")
    assert written == []
    assert contents(again) == contents(convert("at once")) and drafts.JOURNAL not in contents(again)


def test_what_another_writer_left_is_no_part_of_the_result(tmp_path, folder, checkpoint):
    left = tmp_path / ".step_00000000.tmp"
    (left / "sub").mkdir(parents=True)
    (left / "sub/stale").write_text("x")
    (left / "__0_9.distcp").write_text("x")
    assert contents(from_hf(folder, tmp_path)) == contents(checkpoint)


def test_a_journal_of_a_folder_published_meanwhile_is_not_taken(tmp_path, monkeypatch):
    """The second process opens the journal, then the first publishes and ends, then the second gets the lock."""
    draft, real = tmp_path / "draft", drafts.fcntl.flock

    def flock(file, how):
        if not (tmp_path / "published").exists():
            draft.rename(tmp_path / "published")
        real(file, how)

    monkeypatch.setattr(drafts.fcntl, "flock", flock)
    with drafts.Draft(draft, {"a": 1}, {}):
        assert os.listdir(draft) == [drafts.JOURNAL]
    assert (tmp_path / "published" / drafts.JOURNAL).read_bytes() == b""


def test_a_kill_between_the_two_renames_leaves_an_export(tmp_path, checkpoint, monkeypatch):
    out = tmp_path / "out"
    to_hf(checkpoint, out)
    before, rename = contents(out), Path.rename

    def killed(path, target):
        if path.name == ".out.tmp":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            to_hf(checkpoint, out)
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(pieces, "_write", lambda *_: pytest.fail("all of it was written before"))
        patch.setattr(drafts.Draft, "complete", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            to_hf(checkpoint, out)
    assert contents(out) == before, "the earlier export is back as soon as the command runs again"
    to_hf(checkpoint, out)
    assert contents(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_earlier_export_goes_only_after_the_new_ones_name_is_on_the_disk(tmp_path, checkpoint, monkeypatch):
    out = tmp_path / "out"
    to_hf(checkpoint, out)
    before, seen = contents(out), []
    monkeypatch.setattr(hf_folder, "sync", lambda path: seen.append((path, out.exists(), contents(tmp_path / ".out.old") == before)))
    to_hf(checkpoint, out)
    assert seen == [(tmp_path, True, True)]


@pytest.mark.parametrize("command", ["from_hf", "to_hf"])
@pytest.mark.parametrize("step", ["complete", "write_json"])
def test_a_disk_full_after_the_tensors_is_told_as_such(tmp_path, folder, checkpoint, monkeypatch, command, step):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "a file")

    module = importlib.import_module(f"glm.convert.{command}")
    monkeypatch.setattr(*((drafts.Draft, "complete") if step == "complete" else (module, "write_json")), full)
    with pytest.raises(PlatformError, match="No space left on device"):
        from_hf(folder, tmp_path / "out") if command == "from_hf" else to_hf(checkpoint, tmp_path / "out")


def test_a_value_that_fp8_cannot_hold_leaves_nothing(tmp_path):
    wide = tiny_shape(hidden_size=128, dense_ffn_size=128)
    weights = random_hf_weights(wide)
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    checkpoint = from_hf(write_hf_folder(tmp_path / "hf", wide, weights), tmp_path / "ck")
    with pytest.raises(NumericsError, match=r"layers\.0\.mlp\.up_proj"):
        to_hf(checkpoint, tmp_path / "out", fp8=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck", "hf"]


@pytest.mark.parametrize("command", ["from_hf", "to_hf"])
def test_a_source_that_vanishes_is_told_with_file_and_tensor(tmp_path, folder, monkeypatch, command):
    source = Path(shutil.copytree(folder, tmp_path / "hf"))
    victim = source / "model.safetensors" if command == "from_hf" else from_hf(source, tmp_path / "ck") / "__0_0.distcp"
    real = pieces._write

    def write(*arguments):
        victim.unlink(missing_ok=True)
        return real(*arguments)

    monkeypatch.setattr(pieces, "_write", write)
    with pytest.raises(CheckpointError, match=rf"{victim}: (model|decoder|embedding|output_layer|mtp)\..*\n.*no such file"):
        from_hf(source, tmp_path / "new") if command == "from_hf" else to_hf(tmp_path / "ck", tmp_path / "new")


def test_something_at_the_checkpoints_place_is_refused_before_any_work(tmp_path, folder, monkeypatch):
    (tmp_path / "step_00000000").mkdir()
    (tmp_path / "step_00000000/mine").write_text("x")
    written = counted_writes(monkeypatch)
    with pytest.raises(CheckpointError, match=r"step_00000000\n.*no manifest\.json"):
        from_hf(folder, tmp_path)
    assert written == [] and contents(tmp_path) == {"step_00000000/mine": b"x"}


@pytest.mark.parametrize("command", ["from_hf", "to_hf"])
def test_a_draft_with_the_same_pieces_elsewhere_is_not_continued(tmp_path, folder, checkpoint, monkeypatch, command):
    """The names of pieces are those of chunks and tensors, whatever file and offset they go to."""
    def convert() -> None:
        from_hf(folder, tmp_path) if command == "from_hf" else to_hf(checkpoint, tmp_path / "out")

    with monkeypatch.context() as patch:
        patch.setattr(drafts.Draft, "complete", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert()
    if command == "from_hf":
        monkeypatch.setattr("glm.convert.from_hf.FILE_BYTES", 200_000)
    else:
        real = importlib.import_module("glm.convert.to_hf").safetensors_header
        monkeypatch.setattr("glm.convert.to_hf.safetensors_header", lambda tensors: real(tensors) + b" " * 8)
    with pytest.raises(CheckpointError, match="begun with another placement"):
        convert()


def test_more_rows_than_the_vocabulary_are_not_dropped(tmp_path, checkpoint):
    changed = Path(shutil.copytree(checkpoint, tmp_path / "ck"))
    stored, key = torch_dist.tensors(changed), "embedding.word_embeddings.weight"
    stored[key] = Stored(torch.float32, (SHAPE.vocab_size + 8, SHAPE.hidden_size), stored[key].chunks)
    torch_dist.write_metadata(changed, stored)
    told = manifest.read_manifest(changed)
    files = {name: {"bytes": (changed / name).stat().st_size} for name in told["files"]}
    write_json(changed / "manifest.json", told | {"files": files})
    with pytest.raises(CheckpointError, match=rf"{key}\n.*\[328, 64\]\n.*\[320, 64\]"):
        to_hf(changed, tmp_path / "out", digests=False)


@pytest.fixture
def sharded(tmp_path, checkpoint):
    to_hf(checkpoint, tmp_path / "sharded", max_shard_bytes=300_000)
    return tmp_path / "sharded"


def test_a_shard_that_the_index_does_not_name_is_refused_by_name(sharded):
    (sharded / "adapter.safetensors").write_bytes(b"of something else")
    HFFolder(sharded)
    shutil.copyfile(min(sharded.glob("model-*")), sharded / "model-00001-of-00009.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00009\.safetensors\n.*does not name it"):
        HFFolder(sharded)


def test_an_index_with_something_else_than_file_names_is_refused(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = 7
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json: model\.norm\.weight\n.*the file 7"):
        HFFolder(sharded)
