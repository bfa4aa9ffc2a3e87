"""Memory stays bounded, a kill costs little, and nothing partial ever looks whole."""

import errno
import fcntl
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from glm.convert import draft as drafts, pieces
from glm.convert.from_hf import from_hf
from glm.convert.to_hf import to_hf
from glm.errors import CheckpointError, PlatformError
from glm.weights.hf_reader import HFFolder
from glm.weights.hf_shapes import hf_shapes
from glm.weights.name_map import hf_names
from tests.model_fixture import random_hf_weights, tiny_shape, write_hf_folder

ROOT = Path(__file__).resolve().parents[2]
SHAPE = tiny_shape()
LARGE = tiny_shape(  # head and embedding, the largest tensors, are an eleventh of the whole each
    num_layers=5, hidden_size=512, dense_ffn_size=2048, expert_ffn_size=512, num_attention_heads=16, num_query_groups=4, head_dim=64,
    num_experts=8, vocab_size=6144,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hf_folder(tmp_path_factory.mktemp("hf"), SHAPE, random_hf_weights(SHAPE))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, folder):
    return from_hf(folder, tmp_path_factory.mktemp("imported"))


MEDIUM = tiny_shape(hidden_size=128, vocab_size=2048, expert_ffn_size=96)  # 6 MB: enough pieces to be killed between them


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    return write_hf_folder(tmp_path_factory.mktemp("medium"), MEDIUM, random_hf_weights(MEDIUM))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(size, generator=generator) for name, size in hf_shapes(LARGE).items() if name in set(hf_names(LARGE))
    }
    return write_hf_folder(tmp_path_factory.mktemp("large"), LARGE, weights, initializer_range=LARGE.init_std)


def same_tensors(first: Path, second: Path) -> bool:
    before = HFFolder(first)
    after = HFFolder(second)
    return sorted(before.names) == sorted(after.names) and all(
        before.place(name).digest() == after.place(name).digest() for name in before.names
    )


MEASURED = """
import sys
from glm.convert.from_hf import from_hf
from glm.convert.to_hf import to_hf

def memory(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))

open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew: importing does not count
baseline = memory("VmRSS")
from_hf(sys.argv[1], sys.argv[2])
to_hf(sys.argv[2], sys.argv[3])
print(memory("VmHWM") - baseline)
"""


def test_both_ways_need_less_memory_than_three_of_the_largest_tensor(tmp_path, large):
    read = HFFolder(large)
    largest = max(read.place(name).nbytes for name in read.names)
    total = sum(read.place(name).nbytes for name in read.names)
    assert total > 10 * largest > 100e6, (total, largest)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURED, str(large), str(tmp_path / "ck"), str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) <= 3 * largest, f"{int(done.stdout) / largest:.2f} of the largest tensor"
    assert same_tensors(large, tmp_path / "out")


KILLED = """
import sys, time
from glm.convert import pieces
from tools.convert import {command}
commit = pieces._commit
def slowly(draft, finished):
    commit(draft, finished)
    time.sleep(0.02)
pieces.COMMIT_BYTES, pieces._commit = 1, slowly
print("begins", flush=True)
sys.exit({command}.main(sys.argv[1:]))
"""


def begun(command: str, *arguments: Path) -> subprocess.Popen:
    """The command as a process that is about to write, and that brings what it wrote to the disk often and slowly."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", KILLED.format(command=command), *map(str, arguments)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    process.stdout.readline()
    return process


def wait_for(path: Path, least_lines: int, process: subprocess.Popen) -> None:
    """Until the journal has so many lines, or the process has ended: a fast disk may be done before."""
    deadline = time.monotonic() + 120
    while process.poll() is None and lines_of(path) < least_lines:
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.002)


def lines_of(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:    # not there yet, or published a moment ago
        return 0


@pytest.mark.parametrize("command", ["from_hf", "to_hf"])
def test_killed_at_any_moment_the_same_command_continues(tmp_path, medium, command):
    chance = random.Random(command)
    source, target, draft, final = medium, tmp_path / "ck", tmp_path / "ck/.step_00000000.tmp", tmp_path / "ck/step_00000000"
    if command == "to_hf":
        source, target, draft, final = from_hf(medium, tmp_path / "ck"), tmp_path / "out", tmp_path / ".out.tmp", tmp_path / "out"
    lines = []
    for _ in range(3):
        process = begun(command, source, target)
        wait_for(draft / drafts.JOURNAL, (lines[-1] if lines else 1) + 1, process)  # the first line tells the job, whatever its length
        time.sleep(chance.uniform(0, 0.02) if lines else 0)
        process.kill()
        process.communicate()
        if process.returncode == 0:
            break
        assert not final.exists() or not draft.exists(), "what is published is whole"
        if final.exists():
            break
        lines.append(lines_of(draft / drafts.JOURNAL))
    assert lines and lines == sorted(set(lines)) and lines[0] > 1, f"each run continues the one before: {lines}"
    if not final.exists():
        assert begun(command, source, target).wait() == 0
    assert not draft.exists()
    assert not (final / drafts.JOURNAL).exists()
    if command == "from_hf":
        to_hf(final, tmp_path / "out")
    assert same_tensors(medium, tmp_path / "out")


def test_an_interruption_ends_it_with_one_line_and_the_same_command_continues(tmp_path, medium):
    process = begun("from_hf", medium, tmp_path)
    wait_for(tmp_path / ".step_00000000.tmp" / drafts.JOURNAL, 2, process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode == 130 and told == "interrupted; nothing was published, and the same command continues\n"
    assert [path.name for path in tmp_path.iterdir()] == [".step_00000000.tmp"]
    to_hf(from_hf(medium, tmp_path), tmp_path / "out")
    assert same_tensors(medium, tmp_path / "out")


def stops_after(monkeypatch, count: int, error: BaseException) -> list[str]:
    """Writing raises ``error`` once ``count`` parts are written; returns the names of the files written to, as it goes on."""
    written, real = [], pieces._write

    def write(folder, part, *rest):
        if len(written) >= count:
            raise error
        written.append(part.file)
        return real(folder, part, *rest)

    monkeypatch.setattr(pieces, "_write", write)
    monkeypatch.setattr(pieces, "COMMIT_BYTES", 1)
    return written


@pytest.mark.parametrize("command", ["from_hf", "to_hf"])
def test_a_disk_that_fills_up_is_told_and_what_was_written_is_not_written_again(tmp_path, folder, checkpoint, monkeypatch, command):
    full = OSError(errno.ENOSPC, "No space left on device", "a file")

    def convert(name: str) -> Path:
        return from_hf(folder, tmp_path / name) if command == "from_hf" else to_hf(checkpoint, tmp_path / name)

    with monkeypatch.context() as patch:
        whole = stops_after(patch, 1_000, full)
        convert("at once")
    with monkeypatch.context() as patch:
        stops_after(patch, 30, full)
        with pytest.raises(PlatformError, match="No space left on device"):
            convert("out")
    assert not list((tmp_path / "out").glob("step_*" if command == "from_hf" else "*"))
    with monkeypatch.context() as patch:
        second = stops_after(patch, 1_000, full)
        convert("out")
    assert len(whole) - 30 <= len(second) <= len(whole) - 22, f"{len(second)} of {len(whole)} parts written the second time"
    if command == "from_hf":
        assert {path.name: path.read_bytes() for path in (tmp_path / "out/step_00000000").glob("[!h]*")} == {
            path.name: path.read_bytes() for path in (tmp_path / "at once/step_00000000").glob("[!h]*")}
    else:
        assert same_tensors(folder, tmp_path / "out")


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(drafts.shutil, "disk_usage", lambda _: usage(10**6, 0, 10**6))
    with pytest.raises(PlatformError, match=r"0\.00 GB free\n.*make room|GB free"):
        from_hf(folder, tmp_path)
    assert all(path.stat().st_size < 10_000 for path in tmp_path.rglob("*") if path.is_file())


def test_a_kernel_that_refuses_to_write_is_told_without_a_traceback(tmp_path, folder):
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 500; exec "$@"', "bash", sys.executable, "-m", "tools.convert.from_hf", str(folder), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )
    assert done.returncode == 2 and "step_00000000.tmp/__0_0.distcp\n  found:    File too large" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "step_00000000").exists()


def test_a_changed_source_is_not_mixed_with_what_was_copied_before(tmp_path, folder, monkeypatch):
    source = Path(shutil.copytree(folder, tmp_path / "hf"))
    with monkeypatch.context() as patch:
        stops_after(patch, 30, OSError(errno.ENOSPC, "full", "a file"))
        with pytest.raises(PlatformError):
            from_hf(source, tmp_path / "ck")
    with pytest.raises(CheckpointError, match="begun with another params"):
        from_hf(source, tmp_path / "ck", params="bf16")
    changed = random_hf_weights(SHAPE, seed=5)
    write_hf_folder(source, SHAPE, changed)
    with pytest.raises(CheckpointError, match=r"step_00000000\.tmp\n.*begun with another source"):
        from_hf(source, tmp_path / "ck")
    shutil.rmtree(tmp_path / "ck/.step_00000000.tmp")
    to_hf(from_hf(source, tmp_path / "ck"), tmp_path / "out")
    assert same_tensors(source, tmp_path / "out")


@pytest.mark.parametrize("command", ["from_hf", "to_hf"])
def test_a_source_that_changes_while_it_is_read_is_not_published(tmp_path, folder, monkeypatch, command):
    source = Path(shutil.copytree(folder, tmp_path / "hf"))
    victim, target = source / "model.safetensors", tmp_path / "ck"
    if command == "to_hf":
        victim, target = from_hf(source, tmp_path / "ck") / "__0_0.distcp", tmp_path / "out"
    real = pieces._write

    def write(*arguments):
        victim.touch()
        return real(*arguments)

    monkeypatch.setattr(pieces, "_write", write)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        from_hf(source, target) if command == "from_hf" else to_hf(tmp_path / "ck", target)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("ck/step_*")) * (command == "from_hf")


def test_two_commands_do_not_write_one_draft(tmp_path, folder):
    draft = tmp_path / ".step_00000000.tmp"
    draft.mkdir()
    with (draft / drafts.JOURNAL).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process is writing it"):
            from_hf(folder, tmp_path)
    assert from_hf(folder, tmp_path).is_dir()


def test_a_line_of_the_journal_that_was_cut_is_written_again(tmp_path, folder, monkeypatch):
    with monkeypatch.context() as patch:
        stops_after(patch, 30, OSError(errno.ENOSPC, "full", "a file"))
        with pytest.raises(PlatformError):
            from_hf(folder, tmp_path)
    journal = tmp_path / ".step_00000000.tmp" / drafts.JOURNAL
    journal.write_bytes(journal.read_bytes()[:-40])
    to_hf(from_hf(folder, tmp_path), tmp_path / "out")
    assert same_tensors(folder, tmp_path / "out")


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, folder):
    made = [from_hf(folder, tmp_path / str(workers), workers=workers) for workers in (1, 5)]
    files = [{path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} for folder in made]
    assert files[0] == files[1]
