"""The report page of whole, partial and empty runs."""

import re
import time

import numpy as np
import pytest

from glm.checkpoint.run_folder import RunFolder, write_json
from glm.errors import DataError
from glm.metrics.figures import smoothed, thinned
from glm.metrics.read import read_run
from glm.metrics.report import write_report
from glm.metrics.report_layers import over_time
from glm.metrics.stage import Stage
from tests.metrics.synthetic_run import write_rl_stage, write_training_stage


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic")
    write_json(RunFolder(root).recipe("tokenizer"), {"name": "synthetic", "main": "pretrain.tokenizer"})
    write_json(RunFolder(root).done("tokenizer"), {"fingerprint": "2"})
    tokens = write_training_stage(root, "pretrain_general", steps=40)
    write_training_stage(root, "midtrain_reasoning", steps=20, first_token=tokens, parent="pretrain_general")
    write_training_stage(root, "midtrain_branch", steps=20, first_token=tokens, parent="pretrain_general")
    write_rl_stage(root, steps=20)
    started = time.process_time()
    page = write_report(root).read_text()
    return root, page, time.process_time() - started


def test_a_full_report_holds_the_numbers_of_the_run(full_run):
    root, page, _ = full_run
    stages = read_run(root).stages
    for stage in ("pretrain_general", "midtrain_reasoning"):
        for value in (stages[stage].first("train/loss"), stages[stage].last("train/loss"), stages[stage].last("validation/loss")):
            assert f"{value:.3f}" in page
    for accuracy in ("24.3% ± 1.2", "48.7% ± 1.2", "51.2% ± 2.3", "63.1% ± 2.3", "+24.4 points ± 1.7",
                     "+11.9 points", "68.7% ± 3.0", "36.2% ± 5.0"):
        assert accuracy in page, accuracy
    assert "5 of 5" in page and "pretrain.tokenizer" in page
    assert page.count("<svg") >= 24
    for words in ("Loss of every source", "below 2.05K", "MaxVio: load of the busiest expert", "Largest attention logit", "forward-backward"):
        assert words in page, words


def test_the_page_loads_nothing_and_runs_nothing(full_run):
    _, page, _ = full_run
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?\s*(?:https?:)?//""", page)
    assert not re.search(r"<(?:script|link|iframe|object|embed)\b|@import", page)
    targets = set(re.findall(r"""(?:src|href)=["']?([^"'>]{5})""", page))
    assert all(target.startswith(("data:", "#")) for target in targets), targets


def test_what_the_model_wrote_is_escaped(full_run):
    _, page, _ = full_run
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; ü" in page


def test_the_report_takes_less_than_four_seconds_of_one_core(full_run):
    assert full_run[2] < 4, "the import of matplotlib included"


def test_branches_of_one_parent_are_drawn_one_after_the_other_and_named(full_run):
    _, page, _ = full_run
    assert "overlap: midtrain_branch." in page


def test_a_run_that_stopped_halfway_says_what_is_missing(tmp_path):
    write_rl_stage(tmp_path, steps=5, finished=False)
    (tmp_path / "metrics.jsonl").open("a").write('{"stage":"rl_reas')
    page = write_report(tmp_path).read_text()
    for words in ("No training stage has logged a step yet.", "No expert load was logged.",
                  "has not reached its evaluation at the end yet", "24.3% ± 1.2", "1 torn line(s)", "0 of 1"):
        assert words in page, words


def test_a_run_with_only_a_recipe_or_one_step_has_a_report(tmp_path):
    write_json(RunFolder(tmp_path / "a").recipe("tokenizer"), {"name": "just begun", "main": "pretrain.tokenizer"})
    page = write_report(tmp_path / "a").read_text()
    assert "just begun" in page and "No stage has written sample dialogues yet." in page
    write_training_stage(tmp_path / "b", "pretrain_general", steps=1)
    assert "pretrain_general" in write_report(tmp_path / "b").read_text()


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(DataError, match="folder of a run"):
        write_report(tmp_path)


def test_thinning_keeps_the_mean_and_smoothing_ignores_what_is_not_finite():
    x, y = thinned(range(10_000), range(10_000), points=100)
    assert len(x) == 100 and y.mean() == pytest.approx(4999.5)
    assert smoothed([1.0, np.nan, 3.0, 5.0], 2) == pytest.approx([1.0, 1.0, 3.0, 4.0])


def test_layers_that_have_none_and_lines_of_another_model_are_no_hindrance(full_run):
    root, _, _ = full_run
    stage = Stage("s", read_run(root).stages["pretrain_general"], {}, True, "#000")
    x, values = over_time([stage], "update/by_layer/experts")
    assert values.shape == (len(x), 4) and np.isnan(values[:, 0]).all() and (values[:, 1:] == 0.2).all()
    stage.metrics.lines.append({"step": 41, "update/by_layer/experts": [0.1, 0.1]})
    assert len(over_time([stage], "update/by_layer/experts")[0]) == len(x)
