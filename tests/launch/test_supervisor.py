"""Ranks that die, again and again: what is started again, and when it is enough. Real processes, no work."""

import json
import sys

import pytest

from glm.checkpoint.run_folder import RunFolder
from glm.errors import PlatformError
from glm.launch.local import run_ranks
from glm.launch.supervisor import supervise
from glm.recipe.compose import load_run
from tests.runs import TINY

STAGE = "tokenizer"
WORK = """
import json, os, pathlib, signal, sys, time
root = pathlib.Path(sys.argv[1]); count = root / "count"
number = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(number))
def log(step): open(root / "metrics.jsonl", "a").write(json.dumps({"stage": "tokenizer", "step": step}) + "\\n")
def begin(step):
    entry = {"kind": "start", "step": step, "unix_seconds": round(time.time(), 1)}
    open(root / "stages" / "tokenizer" / "restarts.jsonl", "a").write(json.dumps(entry) + "\\n")
def die(): os.kill(os.getpid(), signal.SIGKILL)
"""


class Supervised:
    def __init__(self, root, body: str, limit: int = 2):
        self.folder, self.said, self.waits = RunFolder(root), [], []
        self.recipe = load_run(TINY, [f"run_folder={root}", f"{STAGE}.launcher.max_restarts={limit}"]).stages[STAGE]
        self.command = [sys.executable, "-c", WORK + body, str(root)]

    def __call__(self) -> None:
        self.folder.root.mkdir(exist_ok=True)
        supervise(
            lambda attempt: run_ranks(self.command, 1, self.folder.stage(STAGE), stage=STAGE, attempt=attempt), self.recipe, self.folder,
            self.said.append, self.waits.append,
        )

    @property
    def starts(self) -> int:
        return int((self.folder.root / "count").read_text())

    @property
    def restarts(self) -> list[dict]:
        return [json.loads(line) for line in self.folder.restarts(STAGE).read_text().splitlines()]


def test_a_killed_stage_is_started_again_with_the_reason_told_and_recorded(tmp_path):
    stage = Supervised(tmp_path / "run", "number < 2 and die()")
    stage()
    assert stage.starts == 2 and stage.waits == [2.0]
    assert "killed by SIGKILL" in stage.said[0] and "starts again in 2 s" in stage.said[0]
    (entry,) = stage.restarts
    assert entry["kind"] == "killed" and entry["restarted"] and "rank 0" in entry["reason"]


def test_a_rank_that_held_the_interpreter_is_told_by_the_place_of_its_main_thread(tmp_path):
    body = """
report = root / "stages" / "tokenizer" / "hang_rank_0.txt"; report.parent.mkdir(parents=True, exist_ok=True)
def hold():
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex); library.pthread_mutex_lock(mutex)
if number < 2:
    import ctypes, faulthandler, threading, time
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    faulthandler.dump_traceback_later(0.5, exit=True, file=report.open("w"))
    hold()
"""
    stage = Supervised(tmp_path / "run", body)
    stage()
    assert stage.restarts[0]["kind"] == "hang" and stage.restarts[0]["restarted"]
    assert "rank 0, holds the interpreter's lock and waits for no other rank: File" in stage.said[0] and "in hold" in stage.said[0]


def test_restarts_in_vain_wait_longer_each_time_and_come_to_an_end(tmp_path):
    stage = Supervised(tmp_path / "run", "die()")
    with pytest.raises(PlatformError, match="started 3 times without getting further"):
        stage()
    assert stage.starts == 3 and stage.waits == [2.0, 4.0] and [entry["restarted"] for entry in stage.restarts] == [True, True, False]


def test_a_stage_that_gets_further_each_time_is_never_given_up(tmp_path):
    stage = Supervised(tmp_path / "run", "log(number); number < 7 and die()")
    stage()
    assert stage.starts == 7 and set(stage.waits) == {1.0}


def test_dying_at_the_same_step_is_not_getting_further(tmp_path):
    stage = Supervised(tmp_path / "run", "log(5); die()")
    with pytest.raises(PlatformError):
        stage()
    assert stage.starts == 4, "the first one got to step 5, two restarts did not get further"


@pytest.mark.parametrize(("body", "starts"), [
    ("sys.exit(2)", 1), ("log(number); sys.exit(2)", 1), ("raise ValueError", 1), ("number < 3 and (log(number), sys.exit(1))", 3),
])
def test_a_mistake_is_told_at_once_and_an_error_after_a_step_is_tried_again(tmp_path, body, starts):
    stage = Supervised(tmp_path / "run", body)
    try:
        stage()
        assert starts > 1
    except PlatformError:
        assert starts == 1
    assert stage.starts == starts


@pytest.mark.parametrize(("went_on_from", "starts"), [(2, 3), (5, 2)])
def test_steps_done_again_are_steps_even_when_they_end_where_an_earlier_start_did(tmp_path, went_on_from, starts):
    stage = Supervised(tmp_path / "run", f"log(5); number == 1 and die(); begin({went_on_from}); number == 2 and sys.exit(1)")
    try:
        stage()
        assert starts == 3
    except PlatformError:
        assert starts == 2, "no step after the one it went on from: a mistake of the program's"
    assert stage.starts == starts


def test_without_restarts_nothing_is_started_again_but_a_planned_rollback(tmp_path):
    stage = Supervised(tmp_path / "run", "number < 2 and sys.exit(76); die()", limit=0)
    stage.folder.stage(STAGE).mkdir(parents=True)
    stage.folder.rollbacks(STAGE).write_text('[{"from_step": 4, "to_step": 2, "reasons": ["the loss is nan"]}]')
    with pytest.raises(PlatformError, match="SIGKILL"):
        stage()
    assert stage.starts == 2 and stage.waits == [0.0] and "goes back from step 4 to step 2: the loss is nan" in stage.said[0]
