"""Where a stage's time went, from what it left behind."""

import pytest

from glm.metrics.goodput import goodput


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
