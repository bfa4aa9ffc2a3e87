"""Where a stage's time went, from what it left behind."""

import pytest

from glm.checkpoint.run_folder import RunFolder
from glm.metrics.goodput import goodput
from glm.metrics.log import MetricLog
from glm.metrics.phases import Phases
from glm.metrics.read import read_lines
from glm.metrics.report_parts import phase_means
from glm.recipe.sections import Logging


def line(step: int, time_seconds: float, took: float, **phases: float) -> dict:
    return {"step": step, "time_seconds": time_seconds, "train/step_seconds": took} | {f"phase/{k}_seconds": v for k, v in phases.items()}


def test_every_second_is_counted_once():
    lines = [line(1, 11, 10, data=1), line(2, 23, 10, data=1, checkpoint=2), line(3, 33, 10, data=0), {"step": 3, "time_seconds": 36}]
    restarts = [
        {"kind": "start", "startup_seconds": 5.0, "repeated_seconds": 0.0},
        {"kind": "hang", "idle_seconds": 30.0, "wait_seconds": 1.0},
        {"kind": "start", "startup_seconds": 5.0, "repeated_seconds": 12.0},
        {"kind": "killed", "idle_seconds": 4.0, "wait_seconds": 2.0},
        {"kind": "start", "startup_seconds": 5.0, "repeated_seconds": 0.0},
    ]
    told = goodput(lines, restarts)
    assert told.seconds == {
        "training": 28.0, "start-up": 15.0, "data": 2.0, "checkpoints": 2.0, "validation": 0.0, "repeated": 16.0, "hung": 30.0,
        "waiting": 3.0, "other": 4.0,
    }
    assert told.total == 36 + 15 + 16 + 30 + 3 and told.share == pytest.approx(0.28)
    assert told.sentence.startswith("goodput 28.0 %: training 28 s, start-up 15 s, data 2 s")
    assert "validation" not in told.sentence
    assert told.metrics["goodput/share"] == 0.28 and told.metrics["goodput/start_up_seconds"] == 15.0


def test_lines_of_every_tenth_step_stand_for_ten():
    every = goodput([line(step, 2.0 * step, 2.0) for step in range(1, 41)], [])
    tenth = goodput([line(step, 2.0 * step, 2.0) for step in (1, 10, 20, 30, 40)], [])
    assert every.seconds == tenth.seconds and every.share == 1.0


@pytest.mark.parametrize("saved_every", [10, 19])
def test_thinned_lines_lose_no_phase_and_count_none_twice(tmp_path, saved_every):
    """100 steps of 1 s, 0.25 s of them data; a checkpoint of 5 s; every line against every tenth, through the real log."""
    told = []
    for every_steps in (1, 10):
        spent, seconds = Phases(), 0.0
        folder = tmp_path / str(every_steps)
        with MetricLog(folder, "stage", total_steps=100, logging=Logging(every_steps=every_steps, detail_every_steps=0)) as log:
            for step in range(1, 101):
                spent._seconds["data"] += 0.25
                seconds += 1.0
                metrics = {"train/step_seconds": 1.0} | {f"phase/{name}_seconds": took for name, took in spent.so_far().items()}
                if log.line(step, metrics):
                    spent.clear()
                if step % saved_every == 0 and step < 100:
                    spent._seconds["checkpoint"] += 5.0
                    seconds += 5.0
        lines = [record | {"time_seconds": seconds} for record in read_lines(RunFolder(folder).metrics).records]
        told.append(goodput(lines, []).seconds)
    assert told[0] == told[1] and told[0]["training"] == 75 and told[0]["data"] == 25 and told[0]["other"] == 0
    assert told[0]["checkpoints"] == 5 * (99 // saved_every)


def test_the_report_shows_the_mean_of_thinned_steps():
    lines = [{"step": step, "phase/forward_backward_seconds": took} for step, took in ((1, 2.0), (10, 18.0), (20, 20.0))]
    assert [means["forward_backward"] for _, means in phase_means(lines)] == [2.0, 2.0, 2.0]
