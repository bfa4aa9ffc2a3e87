"""A rank that dies, stops or never comes: found out in time, told, and the stage goes on as if nothing had happened."""

import re

import pytest

from glm.checkpoint.run_folder import RunFolder
from glm.errors import PlatformError
from glm.metrics.goodput import of_stage
from tests.faults.stage import STAGE, TWO_RANKS, copy_of, lines, numbers, run, weights
from tests.runs import processes_of

TIMEOUT = 15
QUICK = (*TWO_RANKS, f"{STAGE}.launcher.timeout_seconds={TIMEOUT}")


def disturbed(undisturbed, name: str, fault: dict, *changes: str) -> tuple:
    """(folder, what the launcher said, the one restart's record) of the same stage with a fault."""
    folder = copy_of(undisturbed, name, up_to=0)
    said = run(folder, *QUICK, *changes, faults=fault)
    (restart,) = [entry for entry in lines(folder / "stages" / STAGE / "restarts.jsonl") if entry["kind"] != "start"]
    assert processes_of(folder) == [], "somebody was left behind"
    return folder, "\n".join(said), restart


def test_a_rank_stopped_in_the_middle_of_a_step_is_found_out_and_the_stage_goes_on(undisturbed):
    folder, said, restart = disturbed(undisturbed, "stopped", {"stop": {"rank": 1, "step": 4}})
    assert restart["kind"] == "hang" and restart["step"] == 3
    assert TIMEOUT <= restart["idle_seconds"] < 2 * TIMEOUT
    first, second = re.search(r"rank 0, (.*)", said)[1], re.search(r"rank 1, (.*)", said)[1]
    assert re.search(r"in step 4: waits in all_reduce of float64 \[\d\], call \d+ of the group of ranks \[0, 1\], called by _run \(train/step.py", first), first
    assert "waits for no other rank" in second
    log = (folder / "stages" / STAGE / "rank_1.log").read_text()
    assert "Thread 0x" in log and "most recent call first" in log and " in train" in log, "the stack of the rank to look at"
    assert sorted(numbers(folder)) == [1, 2, 3, 4, 5, 6]
    told = of_stage(RunFolder(folder), STAGE)
    assert told.seconds["hung"] == restart["idle_seconds"] and told.seconds["repeated"] > 0 and told.share < 0.5, told.sentence


@pytest.mark.full
def test_a_rank_that_sleeps_in_a_step_is_named_and_the_stage_goes_on_bit_for_bit(undisturbed_pair):
    folder, said, restart = disturbed(undisturbed_pair, "asleep", {"sleep": {"rank": 0, "step": 2}})
    assert restart["kind"] == "hang" and "rank 0" in said and "waits for no other rank in happen" in said
    assert re.search(r"rank 1, .*waits in all_reduce", said)
    assert numbers(folder) == numbers(undisturbed_pair) and weights(folder, 6) == weights(undisturbed_pair, 6)


@pytest.mark.full
def test_a_thread_that_never_gives_the_interpreter_back_is_found_out_too(undisturbed_pair):
    folder, said, restart = disturbed(undisturbed_pair, "spinning", {"hold": {"rank": 1, "step": 2}})
    assert restart["kind"] == "hang" and re.search(r"rank 0, .*waits in all_reduce", said)
    assert re.search(r"rank 1, holds the interpreter's lock and waits for no other rank: File \".*faults/rank.py\", line \d+ in hold", said), said
    assert numbers(folder) == numbers(undisturbed_pair)


@pytest.mark.full
def test_a_killed_rank_is_named_and_the_stage_goes_on_bit_for_bit(undisturbed_pair):
    folder, said, restart = disturbed(undisturbed_pair, "killed", {"kill": {"rank": 1, "step": 4}})
    assert restart["kind"] == "killed" and "rank 1: it was killed by SIGKILL" in restart["reason"] and "rank 1" in said
    assert restart["idle_seconds"] < TIMEOUT, "the others need not wait for the time-out"
    assert numbers(folder) == numbers(undisturbed_pair) and weights(folder, 6) == weights(undisturbed_pair, 6)


@pytest.mark.full
def test_a_killed_data_worker_is_named_and_the_stage_goes_on_bit_for_bit(undisturbed, capfd):
    folder = copy_of(undisturbed, "worker", up_to=0)
    run(folder, f"{STAGE}.data.workers=2", faults={"kill_worker": {"rank": 0, "step": 4}})
    told = capfd.readouterr().err
    assert f"data worker 0 of stage {STAGE}, rows" in told and "signal 9" in told and "data_worker_0_0.log" in told
    assert numbers(folder) == numbers(undisturbed) and weights(folder, 6) == weights(undisturbed, 6)
    assert processes_of(folder) == [], "a worker was left behind"


def test_a_rank_that_hangs_before_the_first_step_is_named_with_the_collective_the_others_wait_in(undisturbed):
    folder = copy_of(undisturbed, "asleep_early", up_to=0)
    with pytest.raises(PlatformError) as caught:
        run(folder, *QUICK, f"{STAGE}.launcher.max_restarts=0", faults={"sleep_in_restore": {"rank": 1}})
    told = caught.value.found
    assert re.search(r"rank 0, 1\d s in the return to the newest checkpoint: waits in \w+.* of the group of ranks \[0, 1\]", told), told
    assert re.search(r"rank 1, 1\d s in the return to the newest checkpoint: waits for no other rank in happen", told), told
    (entry,) = lines(folder / "stages" / STAGE / "restarts.jsonl")
    assert entry["kind"] == "hang" and processes_of(folder) == []


@pytest.mark.full
def test_a_stage_that_hung_before_its_first_step_goes_on_bit_for_bit(undisturbed_pair):
    folder, _, restart = disturbed(undisturbed_pair, "asleep_once", {"sleep_in_restore": {"rank": 1}})
    assert restart["kind"] == "hang" and restart["restarted"] and restart["step"] == 0
    assert numbers(folder) == numbers(undisturbed_pair)


@pytest.mark.full
def test_without_restarts_the_message_says_who_hung_and_where(undisturbed):
    folder = copy_of(undisturbed, "no_restart", up_to=0)
    with pytest.raises(PlatformError) as caught:
        run(folder, *QUICK, f"{STAGE}.launcher.max_restarts=0", faults={"stop": {"rank": 0, "step": 2}})
    assert "no progress for 15 s" in caught.value.found and "rank 1" in caught.value.found and "rank 0" in caught.value.found
    assert "hang_rank_" in caught.value.todo and processes_of(folder) == []
