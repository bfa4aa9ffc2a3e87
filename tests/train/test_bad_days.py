"""What goes wrong on a machine: each ends in one clear message, a non-zero exit, and intact earlier checkpoints."""

import shutil

import pytest

from tests.runs import SMALL_TOKENIZER, TINY, UNPREPARED, glm, processes_of

STAGE = "pretrain_general"
SETTINGS = (f"{STAGE}.batch.tokens=2048", f"{STAGE}.checkpoint.every_steps=2", f"{STAGE}.checkpoint.keep=3", SMALL_TOKENIZER, UNPREPARED)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A run with a finished stage of two steps."""
    folder = tmp_path_factory.mktemp("bad_days") / "run"
    done = glm("run", TINY, "tokenizer", STAGE, f"{STAGE}.tokens=4096", *SETTINGS, f"run_folder={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def copy_of(folder, name: str):
    """The same run with its stage reopened, so that it continues from its checkpoint."""
    copy = folder.parent / name
    shutil.copytree(folder, copy)
    (copy / "stages" / STAGE / "done.json").unlink()
    return copy


def one_message(done, *parts: str) -> None:
    said = done.stdout + done.stderr
    assert done.returncode != 0
    for part in ("found:", "expected:", "to do:", *parts):
        assert part in said, said
    assert "Traceback" not in said, said


def test_a_corrupt_checkpoint_file_is_named(two_steps):
    folder = copy_of(two_steps, "corrupt")
    victim = sorted((folder / "stages" / STAGE / "checkpoints" / "step_00000002").glob("*.distcp"))[0]
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.write_bytes(raw)
    done = glm("run", TINY, "tokenizer", STAGE, f"{STAGE}.tokens=4096", *SETTINGS, f"run_folder={folder}")
    one_message(done, victim.name, "sha256")
    assert processes_of(folder) == []


def test_a_write_that_fails_while_saving_leaves_earlier_checkpoints(two_steps):
    """A file size limit makes the kernel refuse the write in the middle of the file, as a full disk does."""
    folder = two_steps.parent / "limited"
    shutil.copytree(two_steps, folder)
    stage = folder / "stages" / STAGE
    shutil.rmtree(stage)
    done = glm(
        "run", TINY, "tokenizer", STAGE, f"{STAGE}.tokens=4096", *SETTINGS, f"run_folder={folder}",
        prefix=("bash", "-c", 'ulimit -f 4000; exec "$@"', "bash"), timeout=300,    # a writer that is waited for for ever would take longer
    )
    one_message(done, "step_00000002")
    assert not (stage / "checkpoints" / "step_00000002").exists(), "a torn checkpoint was published"
    assert processes_of(folder) == []
    done = glm("run", TINY, "tokenizer", STAGE, f"{STAGE}.tokens=4096", *SETTINGS, f"run_folder={folder}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_cuda_without_a_device_stops_before_the_first_stage(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    folder = tmp_path / "cuda"
    done = glm("run", TINY, "tokenizer", STAGE, f"{STAGE}.platform=cuda", f"{STAGE}.kernels.experts=grouped_mm", SMALL_TOKENIZER,
               UNPREPARED, f"run_folder={folder}", timeout=60)
    one_message(done, "no usable CUDA device")
    assert done.returncode == 2 and not (folder / "stages").exists(), "the tokenizer ran before the device was asked for"
    assert processes_of(folder) == []
