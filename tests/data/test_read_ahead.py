"""Rows read by worker processes: the same rows for any number of them, and an end with a name when one fails."""

import os
import signal
import time

import pytest

from glm.data import read_ahead
from glm.data.batches import Batches, manifest_path
from glm.data.prepare import prepare
from glm.data.read_ahead import ReadAhead
from glm.errors import DataError, DataWorkerError
from glm.recipe.sections import Source


@pytest.fixture
def recipe(tiny_stages, run_folder, tmp_path):
    folder = tmp_path / "library"
    folder.mkdir()
    for i in range(150):
        (folder / f"{i:03}.txt").write_text("".join(f"file{i}word{j} " for j in range(1 + i % 40)))
    recipe = tiny_stages["midtrain_repo_code"]
    built_in = {name: Source(corpus=name, share=0.5) for name in ("repositories", "dialogues")}
    recipe = with_data(recipe, documents=str(folder), sources=built_in)
    prepare(recipe, run_folder)
    return recipe


def with_data(recipe, **data):
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})


@pytest.fixture
def reader(recipe, run_folder):
    """Makes readers, and closes them."""
    made = []

    def make(workers: int, stride: int = 1, **data) -> ReadAhead:
        made.append(ReadAhead(with_data(recipe, workers=workers, **data), run_folder, stride=stride))
        return made[-1]

    yield make
    for one in made:
        one.close()


def same(one, two) -> bool:
    return len(one) == len(two) and all(
        a.source == b.source and a.document_lengths == b.document_lengths
        and (a.token_ids == b.token_ids).all() and (a.labels == b.labels).all() and (a.loss_mask == b.loss_mask).all()
        for a, b in zip(one, two)
    )


def test_any_number_of_workers_ranks_and_restarts_reads_the_same_rows(recipe, run_folder, reader):
    straight = Batches(recipe, run_folder)
    two = reader(2)
    for first, count in ((0, 6), (6, 6), (12, 6), (18, 9), (27, 9), (3, 5), (300, 1)):  # a ramp, a step back, a jump
        assert same(two.rows(first, count), straight.rows(first, count))
    ranks = [reader(1, stride=2) for _ in range(2)]
    for step in range(3):
        parts = [row for rank, one in enumerate(ranks) for row in one.rows(step * 8 + rank * 4, 4)]
        assert same(parts, straight.rows(step * 8, 8))
    restarted = reader(3)
    assert same(restarted.rows(12, 6), straight.rows(12, 6))


def test_the_rows_of_the_next_step_are_there_before_they_are_asked_for(recipe, run_folder, reader):
    one = reader(1, stride=2)
    one.rows(0, 4)
    latest = time.monotonic() + 30
    while not one._workers[0].connection.poll() and time.monotonic() < latest:
        time.sleep(0.01)
    os.kill(one._workers[0].process.pid, signal.SIGSTOP)  # from here on it computes nothing
    one._patience_seconds = 0.5
    assert same(one.rows(8, 4), Batches(recipe, run_folder).rows(8, 4))


def test_a_killed_worker_ends_the_stage_with_its_name_and_its_rows(reader):
    two = reader(2)
    two.rows(0, 4)
    os.kill(two._workers[1].process.pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(DataWorkerError, match=r"data worker 1 of stage midtrain_repo_code, rows \d+ to \d+(.|\n)*signal 9(.|\n)*data_worker_0_1.log"):
        for first in range(4, 40, 4):
            two.rows(first, 4)
    assert time.monotonic() - started < 30


def test_a_worker_that_hangs_is_named_after_the_time_out(reader):
    one = reader(1, worker_timeout_seconds=30)
    one.rows(0, 4)
    os.kill(one._workers[0].process.pid, signal.SIGSTOP)
    one._patience_seconds = 1.0
    started = time.monotonic()
    with pytest.raises(DataWorkerError, match="data worker 0(.|\n)*no answer for 1 s(.|\n)*worker_timeout_seconds"):
        one.rows(100, 4), one.rows(104, 4)
    assert time.monotonic() - started < 30


def test_workers_that_answer_one_after_another_are_not_late_together(reader, monkeypatch):
    """Four answers, each well within the time-out, take longer than it in all; none of them is the first of its worker."""
    one = reader(1, worker_timeout_seconds=30)
    one.rows(0, 4)
    one._patience_seconds = 0.4
    answers = iter([{row: "row"} for row in range(100, 104)])

    def slow(connections, timeout):
        time.sleep(0.2)
        assert timeout > 0.3  # what is left of the time-out does not shrink
        return connections

    monkeypatch.setattr(read_ahead, "wait", slow)
    monkeypatch.setattr(one, "_receive", lambda worker: one._ready.update(next(answers)))
    one._ask(100, 4)
    one._wait_for(range(100, 104))


def test_what_a_worker_cannot_read_is_told_as_the_rank_would_tell_it(recipe, run_folder, reader):
    one = reader(1)
    manifest_path(run_folder, recipe.stage).unlink()
    with pytest.raises(DataError, match="run the stage from its beginning"):
        one.rows(0, 2)


def test_a_worker_that_fails_in_the_code_leaves_its_traceback_in_its_log(run_folder, reader):
    one = reader(1)
    one._workers[0].connection.send("no rows")
    with pytest.raises(DataWorkerError, match="ended with code 1"):
        one.rows(0, 2)
    assert "Traceback" in one._workers[0].log.read_text()


def test_closed_workers_are_gone(reader):
    two = reader(2)
    two.rows(0, 2)
    two.close()
    assert all(worker.process.poll() is not None for worker in two._workers)
