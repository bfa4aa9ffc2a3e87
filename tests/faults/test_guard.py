"""When a step is refused, in numbers."""

import math

import pytest

from glm.recipe.sections import Guard
from glm.train.guard import History, after, leave_out, must_roll_back, recent_rollbacks, refusal, rollback_target

HEALTHY = History(losses=tuple(4.0 + 0.1 * math.sin(n) for n in range(40)), grad_norms=tuple(1.0 + 0.2 * math.cos(n) for n in range(40)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_from_the_first_step(bad):
    assert "loss" in refusal(History(), Guard(), bad, 1.0)
    assert "gradient norm" in refusal(History(), Guard(), 4.0, bad)


def test_a_spike_is_refused_and_a_bad_but_ordinary_step_is_not():
    guard = Guard()
    assert "far above" in refusal(HEALTHY, guard, 6.0, 1.0) and "times the median" in refusal(HEALTHY, guard, 4.0, 1000.0)
    assert refusal(HEALTHY, guard, 4.6, 1.0) is None, "within a fifth of the largest"
    assert refusal(HEALTHY, guard, 0.1, 1e-9) is None, "small is not a spike"
    assert refusal(HEALTHY, guard, 4.0, 20.0) is None, "clipping is there for it"
    assert refusal(History(HEALTHY.losses[:31], HEALTHY.grad_norms[:31]), guard, 400.0, 1e6) is None, "too little to judge by"
    assert refusal(HEALTHY, Guard(loss_sigmas=0, grad_norm_factor=0), 400.0, 1e6) is None


def test_the_thresholds_do_not_fire_on_a_falling_loss_a_ramp_or_a_change_of_data():
    guard, history = Guard(), History()
    for step in range(1, 600):
        # steep at first, as in the tiny run; noise shrinks as the batch grows; other data from step 300 on
        noise = math.sin(step * 12.9898) * (0.3 if step < 50 else 0.15)
        loss = 3.0 + 4.6 * math.exp(-step / 40) + noise + (0.4 if step >= 300 else 0.0)
        norm = (0.4 + 2 * math.exp(-step / 60)) * (1 + 0.8 * abs(math.sin(step * 78.233)))
        assert refusal(history, guard, loss, norm) is None, step
        history = after(history, guard, step, loss, norm, refused=False)
    assert len(history.losses) == len(history.grad_norms) == guard.window


def test_a_refused_step_leaves_no_number_and_too_many_within_the_window_go_back():
    guard = Guard(skip_limit=3, window=10, history=2)
    history = HEALTHY
    for step in (50, 55, 60):
        history = after(history, guard, step, math.nan, math.nan, refused=True)
        assert not must_roll_back(history, guard), "50 has left the window when 60 comes"
    assert history.losses == HEALTHY.losses and history.skipped == (55, 60)
    assert must_roll_back(after(history, guard, 61, math.inf, 1.0, refused=True), guard)


def test_rollbacks_of_long_ago_do_not_count():
    guard = Guard(rollback_window=100)
    rollbacks = [{"from_step": 40, "to_step": 30}, {"from_step": 900, "to_step": 850}, {"from_step": 1000, "to_step": 950}]
    assert [recent_rollbacks(rollbacks, guard, step) for step in (960, 1000, 1005, 1100)] == [2, 1, 1, 0]


def test_a_history_comes_back_from_json_as_it_was():
    import json

    history = after(HEALTHY, Guard(), 41, math.nan, 1.0, refused=True)
    assert History.of(json.loads(json.dumps(history.to_json()))) == history
    assert History.of({}) == History(), "a checkpoint of a release without one"


def test_the_way_back_goes_to_the_checkpoint_before_the_first_skipped_step():
    assert rollback_target([3, 6, 9], first_skipped=8) == 6
    assert rollback_target([3, 6, 9], first_skipped=6) == 3, "the checkpoint of step 6 has the skipped step in it"
    assert rollback_target([6, 9], first_skipped=5) == 6, "the one before is gone; the model in this one is as good"
    assert rollback_target([], first_skipped=5) == 0


def test_rows_left_out_are_never_served_and_all_others_once():
    excluded = [(4, 6), (10, 10), (11, 12), (30, 31)]
    served = [row for first in range(0, 24, 6) for start, count in leave_out(first, 6, excluded) for row in range(start, start + count)]
    left_out = {row for first, last in excluded for row in range(first, last + 1)}
    assert served == [row for row in range(served[-1] + 1) if row not in left_out] and len(served) == 24
    assert leave_out(5, 7, []) == [(5, 7)]
