"""metrics.jsonl through kills and resumes, and what the console and wandb get."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

from glm.metrics import read
from glm.metrics.console import Console, describe, short_count
from glm.metrics.log import MetricLog
from glm.metrics.read import StageMetrics, read_lines, read_run
from glm.recipe.sections import Logging


def _steps(folder, stage):
    return [line["step"] for line in read_run(folder).stages[stage].lines]


def test_a_line_comes_back_as_it_was_written(tmp_path):
    with MetricLog(tmp_path, "pretrain", total_steps=2) as log:
        log.line(1, {"train/loss": 0.1 + 0.2, "train/tokens": 4096, "balance/load": np.array([[0.25, 0.75]]), "note": "x"})
    (line,) = read_run(tmp_path).stages["pretrain"].lines
    assert line.pop("time_seconds") >= 0
    assert line == {"stage": "pretrain", "step": 1, "train/loss": 0.1 + 0.2, "train/tokens": 4096,
                    "balance/load": [[0.25, 0.75]], "note": "x"}


def test_a_loss_that_is_not_finite_is_valid_json_and_comes_back(tmp_path):
    with MetricLog(tmp_path, "pretrain", total_steps=None) as log:
        log.line(1, {"train/loss": math.nan, "train/grad_norm": math.inf})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    stage = read_run(tmp_path).stages["pretrain"]
    assert math.isnan(stage.last("train/loss")) and stage.last("train/grad_norm") == math.inf


def test_rewind_drops_the_later_lines_of_its_own_stage_only(tmp_path):
    for stage in ("pretrain", "sft"):
        with MetricLog(tmp_path, stage, total_steps=6) as log:
            for step in range(1, 7):
                log.line(step, {"train/loss": float(step)})
    with MetricLog(tmp_path, "pretrain", total_steps=6) as log:
        log.rewind(3)
        log.line(4, {"train/loss": 40.0})
    assert _steps(tmp_path, "pretrain") == [1, 2, 3, 4]
    assert _steps(tmp_path, "sft") == [1, 2, 3, 4, 5, 6]
    assert read_run(tmp_path).stages["pretrain"].last("train/loss") == 40.0


@pytest.mark.parametrize("step, dropped", [(9, []), (7, [8, 9]), (3, [4, 5, 6, 7, 8, 9]), (-1, list(range(1, 10)))])
def test_rewind_cuts_the_end_and_touches_nothing_before_it(tmp_path, monkeypatch, step, dropped):
    """Lines longer and shorter than a block; what is behind the cut is all that is given back."""
    monkeypatch.setattr(read, "_BLOCK", 100)
    with MetricLog(tmp_path, "pretrain", total_steps=9) as log:
        log.line(1, {"train/loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes().replace(b'":', b'":  ')    # written anew, the line would lose its spaces
    path.write_bytes(before)
    with MetricLog(tmp_path, "sft", total_steps=9) as log:
        for number in range(1, 10):
            log.line(number, {"train/loss": 1.0, "note": "x" * 37 * number})
    lines = path.read_bytes().splitlines(keepends=True)
    with MetricLog(tmp_path, "sft", total_steps=9) as log:
        assert [record["step"] for record in log.rewind(step)] == dropped
    assert path.read_bytes() == b"".join(lines[:len(lines) - len(dropped)]) and path.read_bytes().startswith(before)


def test_a_start_holds_in_memory_only_what_it_drops(tmp_path):
    line = json.dumps({"stage": "sft", "step": 1, "time_seconds": 5.0, "balance/load": [0.5] * 2000}).encode() + b"\n"
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line * 2000)    # 20 MB
    tracemalloc.start()
    with MetricLog(tmp_path, "sft", total_steps=9) as log:
        assert log.rewind(1) == []
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8e6 and path.stat().st_size == 2000 * len(line)


def test_time_counts_on_over_a_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"stage":"sft","step":1,"time_seconds":100.0}\n{"stage":"sft","step":2,"time_seconds":200.0}\n'
        '{"stage":"rl","step":1,"time_seconds":900.0}\n')
    with MetricLog(tmp_path, "sft", total_steps=3) as log:
        log.rewind(1)
        log.line(2, {"train/loss": 1.0})
    assert 100.0 <= read_run(tmp_path).stages["sft"].seconds < 110.0


def test_a_torn_last_line_is_skipped_and_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes('{"stage":"sft","step":1,"a":"ü"}\n{"stage":"sft","step":2,"a":"ü'.encode()[:-1])
    lines = read_lines(path)
    assert [record["step"] for record in lines.records] == [1] and lines.torn == 1


def test_appending_after_a_torn_line_loses_no_new_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage":"sft","step":1}\n{"stage":"sft","st')
    with MetricLog(tmp_path, "sft", total_steps=2) as log:
        log.line(2, {"train/loss": 1.0})
    assert _steps(tmp_path, "sft") == [1, 2] and read_run(tmp_path).torn == 0


def test_a_killed_process_leaves_every_line_it_had_logged(tmp_path):
    program = (
        "import sys, os, signal; from glm.metrics.log import MetricLog\n"
        "log = MetricLog(sys.argv[1], 'sft', total_steps=9)\n"
        "for step in range(1, 6): log.line(step, {'train/loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], stdout=subprocess.DEVNULL, cwd=os.getcwd(), check=False)
    assert done.returncode == -signal.SIGKILL
    assert _steps(tmp_path, "sft") == [1, 2, 3, 4, 5] and read_run(tmp_path).torn == 0


def test_only_rank_zero_writes(tmp_path, capsys):
    with MetricLog(tmp_path / "run", "sft", total_steps=1, enabled=False) as log:
        log.line(1, {"train/loss": 1.0})
        log.rewind(0)
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_every_steps_thins_steps_but_keeps_the_last_and_the_evaluations(tmp_path):
    with MetricLog(tmp_path, "sft", total_steps=10, logging=Logging(every_steps=4)) as log:
        for step in range(1, 11):
            log.line(step, {"train/loss": 1.0})
        log.line(7, {"validation/loss": 2.0})
    assert _steps(tmp_path, "sft") == [1, 4, 8, 10, 7]


def test_a_step_that_measured_everything_is_never_thinned_away(tmp_path):
    with MetricLog(tmp_path, "sft", total_steps=10, logging=Logging(every_steps=4, detail_every_steps=3)) as log:
        for step in range(1, 11):
            log.line(step, {"train/loss": 1.0})
    assert _steps(tmp_path, "sft") == [1, 3, 4, 6, 8, 9, 10]


def test_of_two_lines_of_one_step_the_later_counts():
    rewards = [(2, 0.5), (1, 0.1), (1, 0.2)]
    lines = [{"step": step, "rl/reward": reward} for step, reward in rewards]
    stage = StageMetrics("rl", [*lines, {"step": 3, "rl/sync_seconds": 1}])
    assert stage.series("rl/reward") == ([1.0, 2.0], [0.2, 0.5])


def test_plain_lines_keep_one_order_whatever_order_they_are_logged_in():
    metrics = {"train/grad_norm": 1.5, "train/lr": 2.5e-4, "train/mtp_loss": 2.5, "train/loss": 2.25,
               "train/stage_tokens": 1_234_567, "train/tokens_per_second": 9876.0, "balance/max_over_mean": 1.5,
               "balance/load": [[1.0]], "mtp/accuracy": 0.25, "train/mfu": 0.4}
    expected = "tokens 1.23M  loss 2.2500  mtp 2.5000  mtp hits 0.250  lr 2.50e-04  grad 1.500  tok/s 9.88K  MFU 40.0%  balance 1.50"
    assert describe(metrics) == describe(dict(reversed(metrics.items()))) == expected


def test_the_console_prints_plain_lines_to_a_file_and_a_bar_to_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = {}
    for kind in (io.StringIO, Terminal):
        stream = kind()
        console = Console("rl", 2, stream)
        for step in (1, 2):
            console.line(step, {"rl/reward": 0.25 * step})
            console.advance(step, {"rl/reward": 0.25 * step})
        console.line(2, {"eval/phase": "after", "eval/sampled_accuracy": 0.487, "eval/sampled_standard_error": 0.012})
        console.close()
        shown[kind] = stream.getvalue()
    assert shown[io.StringIO].splitlines() == [
        "rl 1/2  reward 0.250", "rl 2/2  reward 0.500", "rl 2/2  held-out accuracy after:  sampled 48.7% ± 1.2"]
    assert "\x1b[" in shown[Terminal] and "sampled 48.7% ± 1.2" in shown[Terminal]
    assert "rl 2/2  reward 0.500" in shown[Terminal].splitlines()[-1]


@pytest.mark.parametrize(("number", "words"), [(0, "0"), (0.5, "0.5"), (12, "12"), (999, "999"), (2048, "2.05K"), (15e12, "15T")])
def test_counts_are_written_short(number, words):
    assert short_count(number) == words


def test_wandb_offline_writes_a_run_into_the_run_folder(tmp_path):
    pytest.importorskip("wandb")
    with MetricLog(tmp_path, "sft", total_steps=2, logging=Logging(wandb="offline"), config={"seed": 7}) as log:
        for step in (1, 2):
            log.line(step, {"train/loss": 1.0 / step, "balance/load": [[0.5, 0.5]]})
    (run,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    until = time.monotonic() + 30  # wandb's own process may finish writing a moment after the run is closed
    while b"train/loss" not in (content := run.read_bytes()):
        assert time.monotonic() < until, f"only {content[:80]!r} was written"
        time.sleep(0.05)
    assert b"balance/load" not in content


def test_a_missing_wandb_is_a_platform_error_that_says_what_to_install(tmp_path):
    program = (
        "import sys; sys.modules['wandb'] = None\n"
        "from glm.errors import PlatformError; from glm.metrics.log import MetricLog; from glm.recipe.sections import Logging\n"
        "try: MetricLog(sys.argv[1], 'sft', total_steps=1, logging=Logging(wandb='offline'))\n"
        "except PlatformError as error: print(error.todo)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert "pip install wandb" in done.stdout
