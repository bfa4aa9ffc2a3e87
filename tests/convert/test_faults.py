"""Disks, processes and sources that fail at the worst moment: nothing finished is lost, nothing lost is taken for finished."""

import errno
import os
from pathlib import Path

import pytest

from glm.convert import draft as drafts, pieces
from glm.convert.from_hf import from_hf
from glm.convert.to_hf import to_hf
from glm.errors import CheckpointError
from glm.weights import hf_folder
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
