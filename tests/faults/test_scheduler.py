"""The scheduler wants the machines back: saved, code 75, and the same command goes on bit for bit."""

import signal
import time

import psutil
import pytest

from glm.errors import REQUEUE_CODE
from tests.faults.stage import SIX_STEPS, STAGE, TWO_RANKS, copy_of, numbers, weights
from tests.runs import TINY, glm, processes_of, started


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.full)])
def test_a_run_asked_to_stop_saves_its_step_and_the_same_command_finishes_it_bit_for_bit(undisturbed, number):
    folder = copy_of(undisturbed, f"requeued_{number}", up_to=0)
    settings = {change.split("=")[0]: change for change in (*SIX_STEPS, f"{STAGE}.checkpoint={{every_steps: 0}}")}
    words = ("tokenizer", STAGE, *settings.values())
    process = started(folder, *words)
    wait_for_a_step(folder, process)
    process.send_signal(number)
    at = saved_and_queued_again(folder, process)
    goes_on(folder, words, at, undisturbed)


@pytest.mark.full
def test_a_signal_to_one_rank_alone_makes_all_save_the_same_step(undisturbed_pair):
    folder = copy_of(undisturbed_pair, "one_asked", up_to=0)
    settings = {change.split("=")[0]: change for change in (*SIX_STEPS, *TWO_RANKS, f"{STAGE}.checkpoint={{every_steps: 0}}")}
    words = ("tokenizer", STAGE, *settings.values())
    process = started(folder, *words)
    wait_for_a_step(folder, process)
    (asked,) = [one for one in psutil.Process(process.pid).children() if one.environ().get("RANK") == "1"]
    asked.send_signal(signal.SIGTERM)
    at = saved_and_queued_again(folder, process)
    goes_on(folder, words, at, undisturbed_pair)


def wait_for_a_step(folder, process) -> None:
    deadline = time.monotonic() + 240
    while not numbers(folder):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be asked to stop"
        time.sleep(0.05)


def saved_and_queued_again(folder, process) -> int:
    """The step it saved."""
    said = folder.parent / f"{folder.name}.log"
    assert process.wait(timeout=120) == REQUEUE_CODE, said.read_text()[-3000:]
    (saved,) = (folder / "stages" / STAGE / "checkpoints").glob("step_*")
    at = int(saved.name.removeprefix("step_"))
    assert f"saved at step {at}; the same command continues" in said.read_text() and max(numbers(folder)) == at < 6
    assert processes_of(folder) == []
    return at


def goes_on(folder, words: tuple, at: int, undisturbed) -> None:
    done = glm("run", TINY, *words, f"run_folder={folder}")
    assert done.returncode == 0 and f"continues after step {at}" in done.stdout, done.stdout + done.stderr
    assert numbers(folder) == numbers(undisturbed) and weights(folder, 6) == weights(undisturbed, 6)
