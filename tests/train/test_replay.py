"""Steps done again are compared with what the metric log holds of them."""

from types import SimpleNamespace

import pytest

from glm import platform

platform.activate("host")

from glm.errors import NumericsError  # noqa: E402
from glm.metrics.log import MetricLog  # noqa: E402
from glm.train.resume import Replay  # noqa: E402

RECIPE = SimpleNamespace(stage="pretrain_general", precision=SimpleNamespace(params="fp32"))
STEPS = {
    step: {"train/loss": loss, "train/mtp_loss": None, "train/grad_norm": norm}
    for step, loss, norm in ((1, float("nan"), float("inf")), (2, 4.0 / 3, 1e300 / 7), (3, 4.1 / 3, float("-inf")))
}


def replay(folder) -> Replay:
    with MetricLog(folder, RECIPE.stage, total_steps=3) as log:
        for step, metrics in STEPS.items():
            log.line(step, metrics)
        return Replay(RECIPE, log.rewind(0), exact=True)


def test_a_number_that_is_not_finite_equals_the_word_in_the_log(tmp_path, capsys):
    again = replay(tmp_path)
    for step, metrics in STEPS.items():
        again.compare(step, metrics)
    assert "not bit for bit" not in capsys.readouterr().err


def test_the_last_bit_after_such_a_step_is_told_and_another_loss_stops(tmp_path, capsys):
    again = replay(tmp_path)
    again.compare(1, STEPS[1])
    again.compare(2, STEPS[2] | {"train/loss": STEPS[2]["train/loss"] + 2**-52})
    assert "step 2" in (said := capsys.readouterr().err) and "not bit for bit" in said and "grad_norm" not in said
    with pytest.raises(NumericsError):
        replay(tmp_path / "finite").compare(1, STEPS[1] | {"train/loss": 4.0})
