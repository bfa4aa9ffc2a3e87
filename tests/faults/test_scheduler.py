"""The scheduler wants the machines back: saved, code 75, and the same command goes on bit for bit."""

import signal
import time

import pytest

from glm.errors import REQUEUE_CODE
from tests.faults.stage import SIX_STEPS, STAGE, copy_of, numbers, weights
from tests.runs import TINY, glm, processes_of, started


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.full)])
def test_a_run_asked_to_stop_saves_its_step_and_the_same_command_finishes_it_bit_for_bit(undisturbed, number):
    folder = copy_of(undisturbed, f"requeued_{number}", up_to=0)
    settings = {change.split("=")[0]: change for change in (*SIX_STEPS, f"{STAGE}.checkpoint={{every_steps: 0}}")}
    words = ("tokenizer", STAGE, *settings.values())
    process = started(folder, *words)
    deadline = time.monotonic() + 240
    while not numbers(folder):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be asked to stop"
        time.sleep(0.05)
    process.send_signal(number)
    said = folder.parent / f"{folder.name}.log"
    assert process.wait(timeout=120) == REQUEUE_CODE, said.read_text()[-3000:]
    (saved,) = (folder / "stages" / STAGE / "checkpoints").glob("step_*")
    at = int(saved.name.removeprefix("step_"))
    assert f"saved at step {at}; the same command continues" in said.read_text() and max(numbers(folder)) == at < 6
    assert processes_of(folder) == []
    done = glm("run", TINY, *words, f"run_folder={folder}")
    assert done.returncode == 0 and f"continues after step {at}" in done.stdout, done.stdout + done.stderr
    assert numbers(folder) == numbers(undisturbed) and weights(folder, 6) == weights(undisturbed, 6)
