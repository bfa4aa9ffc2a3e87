"""What a stage that goes back leaves to be looked at."""

import json
from types import SimpleNamespace

import pytest

from glm import platform

platform.activate("host")

from glm.checkpoint.run_folder import RunFolder  # noqa: E402
from glm.errors import NumericsError, StageStopped  # noqa: E402
from glm.recipe.compose import load_run  # noqa: E402
from glm.train.plan import Progress, plan_step  # noqa: E402
from glm.train.setbacks import Setbacks  # noqa: E402
from tests.runs import TINY  # noqa: E402
from tests.train.test_trainer import trainer  # noqa: E402

STAGE = "pretrain_general"


def go_back(folder: RunFolder) -> None:
    """A start of the stage whose first step is refused."""
    recipe = load_run(TINY, [f"{STAGE}.guard={{skip_limit: 1, rollback_limit: 1}}"]).stages[STAGE]
    setbacks = Setbacks(recipe, folder, SimpleNamespace(is_first=True))
    setbacks.resume(Progress(0, 0), finish_save=lambda: None)
    refused = SimpleNamespace(metrics={"loss": float("nan")}, grad_norm=7.0, refused="the loss is nan")
    setbacks.after(plan_step(recipe, Progress(0, 0)), refused, SimpleNamespace(sources=lambda first, count: {"prose": count}))


def test_records_of_refused_steps_outlive_the_rollback_and_the_message_of_the_last_one_names_them(tmp_path):
    trainer()    # starts the process group
    folder = RunFolder(tmp_path)
    with pytest.raises(StageStopped, match="rollback 1"):
        go_back(folder)
    (record,) = map(json.loads, folder.skipped(STAGE).read_text().splitlines())
    with pytest.raises(NumericsError, match="after 1 rollbacks") as told:
        go_back(folder)
    (rollback,) = json.loads(folder.rollbacks(STAGE).read_text())
    assert rollback["skipped"] == [record] and rollback["rows"] == record["rows"] and record["loss"] == "nan" and record["grad_norm"] == "7.0"
    (now,) = map(json.loads, folder.skipped(STAGE).read_text().splitlines())
    assert now["rows"] != record["rows"], "the first start's record is gone from here"
    assert "rollbacks.json" in told.value.todo and "raise guard.rollback_limit" in told.value.todo
