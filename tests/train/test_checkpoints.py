"""Checkpoints of a stage: written while it trains, continued from bit for bit, refused when they are of something else."""

import json
import os
import shutil
import signal

import pytest

from glm.checkpoint import manifest
from glm.checkpoint.manifest import MANIFEST, checkpoint_steps, read_manifest, seal, verify
from glm.checkpoint.retention import MILESTONE
from glm.checkpoint.run_folder import RunFolder, write_json
from tests.train.forked import STAGE, Ranks, checkpoints, completed, numbers, part_of, refused, start_of, state_digests

NEXT = "pretrain_code_reasoning"


def has(folder, step: int, stage: str = STAGE):
    return lambda: step in checkpoint_steps(checkpoints(folder, stage))


def equal(folder, whole, stage: str = STAGE) -> None:
    assert numbers(folder, stage) == numbers(whole, stage)
    assert state_digests(folder, stage) == state_digests(whole, stage)


def test_a_stage_killed_three_times_in_a_row_ends_bitwise_like_one_that_was_not(whole, text):
    """The first kill is inside the batch ramp; a start that was killed before a new checkpoint continues from the same one again.

    Every start has another number of workers that read data ahead."""
    folder = start_of(whole, "killed_thrice")
    for step, workers in ((2, 0), (4, 2), (4, 1)):
        with Ranks(folder, text, f"{STAGE}.data.workers={workers}") as ranks:
            ranks.until(lambda: has(folder, step)() and max(numbers(folder), default=0) > step)
    said = completed(folder, text)
    assert "continues after step" in said and "bit for bit" not in said
    assert sorted(numbers(folder)) == list(range(1, 9))
    equal(folder, whole)


def test_a_synchronous_checkpoint_has_the_same_bytes(whole, text):
    folder = start_of(whole, "synchronous")
    completed(folder, text, "checkpoint.asynchronous=false", "checkpoint.every_steps=3")
    equal(folder, whole)


def test_a_stage_edge_crossed_after_a_kill_is_the_edge_of_an_undisturbed_run(whole, text):
    folder = part_of(whole, "edge", (8,))    # killed after its last checkpoint: nothing is left to do but to say so
    completed(folder, text)
    assert state_digests(folder) == state_digests(whole)
    with Ranks(folder, text, stage=NEXT) as ranks:    # killed before it has a checkpoint of its own
        ranks.until(lambda: len(numbers(folder, NEXT)) >= 1)
    completed(folder, text, stage=NEXT)
    completed(whole, text, stage=NEXT)
    equal(folder, whole, NEXT)


def test_an_epoch_edge_is_crossed_alike_after_a_kill(prepared, tmp_path):
    """Six short documents: every step reads them all, in another order each time."""
    texts = tmp_path / "text"
    texts.mkdir()
    for number in range(6):
        (texts / f"{number}.py").write_text(f"def f{number}(x):\n    return x * {number}\n" * 6)
    own = (f"data.documents={texts}", "pretrain_general.tokens=2048")
    once, twice = start_of(prepared, "epochs"), start_of(prepared, "epochs_killed")
    completed(once, *own)
    with Ranks(twice, *own) as ranks:
        ranks.until(has(twice, 2))
    completed(twice, *own)
    assert json.loads((once / "data" / "report.json").read_text())[STAGE]["prose"]["epochs"] > 2
    equal(twice, once)


def test_training_goes_on_while_a_checkpoint_is_written(whole, text):
    folder = start_of(whole, "slow_disk")
    with Ranks(folder, text) as ranks:
        ranks.until(ranks.writers)
        (writer,) = ranks.writers()
        writer.suspend()
        steps = len(numbers(folder))
        ranks.until(lambda: len(numbers(folder)) > steps, seconds=60)
        published = checkpoint_steps(checkpoints(folder))
        writer.resume()
        assert ranks.wait() == 0, ranks.said
    assert published == []
    equal(folder, whole)


def test_a_writer_that_dies_is_loud_and_leaves_the_former_checkpoint(whole, text):
    """It ends as a dead rank does: with a code after which the stage is started again."""
    folder = start_of(whole, "dead_writer")
    with Ranks(folder, text) as ranks:
        ranks.until(lambda: has(folder, 2)() and ranks.writers())
        for writer in ranks.writers():
            writer.send_signal(signal.SIGKILL)
        assert ranks.wait() == 1, ranks.said
        assert "found:" in ranks.said and "step_0000000" in ranks.said and "earlier checkpoints are intact" in ranks.said
        assert "Traceback" not in ranks.said
    assert checkpoint_steps(checkpoints(folder))[0] == 2 and not list(checkpoints(folder).glob(".step*"))
    completed(folder, text)
    equal(folder, whole)


def test_a_disk_that_fills_while_a_checkpoint_is_written_leaves_the_former_one(whole, text):
    """That is for the user to put right: every rank says so, also the one that was not told what failed."""
    folder = part_of(whole, "full", (4,))
    largest = max(path.stat().st_size for path in checkpoints(folder).rglob("*.distcp"))
    with Ranks(folder, text, f"{STAGE}.launcher.ranks_per_node=2", f"{STAGE}.layout.ep=2", most_bytes=largest // 4) as ranks:
        ranks.until(ranks.poll)
        assert set(ranks.status.values()) == {2}, ranks.said
        for part in ("step_00000006", "File too large", "earlier checkpoints are intact"):
            assert part in ranks.said
        assert "Traceback" not in ranks.said
    assert checkpoint_steps(checkpoints(folder)) == [4] and not list(checkpoints(folder).glob(".step*"))
    completed(folder, text)
    assert state_digests(folder) == state_digests(whole)


def test_a_stage_ends_although_another_node_does_not_see_its_last_checkpoint(whole, text, monkeypatch):
    """As on a shared disk whose listings lag: ranks that each looked for themselves would not all begin the same save."""
    seen = manifest.step_folders
    monkeypatch.setattr(manifest, "step_folders", lambda folder: seen(folder) if os.environ.get("RANK") == "0" else [])
    folder = part_of(whole, "lagging", (6,))
    with Ranks(folder, text, f"{STAGE}.launcher.ranks_per_node=2", f"{STAGE}.layout.ep=2") as ranks:
        assert ranks.wait(seconds=60) == 0, ranks.said
    monkeypatch.undo()
    assert checkpoint_steps(checkpoints(folder)) == [6, 8]


def test_milestones_stay_and_do_not_count(whole, text):
    folder = start_of(whole, "milestones")
    completed(folder, text, "checkpoint.keep=1", "checkpoint.milestone_tokens=1024")
    kept = {step: read_manifest(checkpoints(folder) / f"step_{step:08d}")["info"]["run_tokens"] for step in checkpoint_steps(checkpoints(folder))}
    assert kept == {3: 1024, 5: 2048, 7: 3072, 8: 3584}    # 3, 5 and 7 are no multiples of every_steps
    marked = checkpoints(folder) / "step_00000003"
    (marked / MILESTONE).unlink()
    assert verify(marked), "a mark is nothing that was written"
    assert state_digests(folder) == state_digests(whole)


def test_another_layout_continues_equal_up_to_rounding_and_says_so(whole, text):
    folder = part_of(whole, "two_ranks", (4,))
    shutil.copy(whole / "metrics.jsonl", folder)
    said = completed(folder, text, f"{STAGE}.launcher.ranks_per_node=2", f"{STAGE}.layout.ep=2")
    assert "continues under another layout" in said and "layout.ep: 1 -> 2" in said
    expected, found = numbers(whole), numbers(folder)
    assert float(found[5][0]) == pytest.approx(float(expected[5][0]), rel=1e-5)
    assert float(found[5][0]) != pytest.approx(float(expected[6][0]), rel=1e-3), "the loss does not move, so the comparison says nothing"
    assert float(found[8][0]) == pytest.approx(float(expected[8][0]), rel=1e-2)


@pytest.mark.parametrize("override, told", [("schedule.peak_lr=0.5", "schedule.peak_lr: "), ("seed=3", "seed: 0 -> 3")])
def test_a_rank_started_by_itself_refuses_another_recipe_with_the_difference(whole, text, override, told):
    folder = part_of(whole, f"other_{override[:4]}", (4,))
    said = refused(folder, text, override)
    assert told in said and "another recipe" in said


def test_another_tokenizer_is_refused(whole, text):
    folder = part_of(whole, "other_tokenizer", (4,))
    path = RunFolder(folder).tokenizer / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    assert "tokenizer" in refused(folder, text)


def test_weights_that_are_not_those_of_the_save_are_noticed_by_their_loss(whole, text):
    """Every byte is as the manifest says: only the loss of the held-out rows tells that the tensors are those of another step."""
    folder = part_of(whole, "wrong_weights", (2, 4))
    older, newer = (checkpoints(folder) / name for name in ("step_00000002", "step_00000004"))
    claimed = read_manifest(newer)
    shutil.rmtree(newer)
    older.rename(newer)
    write_json(newer / MANIFEST, seal({key: value for key, value in (claimed | {"files": read_manifest(newer)["files"]}).items() if key != "sha256"}))
    assert "held-out rows after loading" in refused(folder, text)


@pytest.mark.parametrize("factor, told", [(1.01, "as it was logged"), (1 + 1e-9, "not bit for bit what was logged")])
def test_steps_done_again_are_compared_with_what_was_logged_of_them(whole, text, factor, told):
    folder = part_of(whole, f"replayed_{factor > 1.001}", (4,))
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["stage"] == STAGE and record["step"] == 5:
            record["train/loss"] *= factor
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert told in (refused(folder, text) if factor > 1.001 else completed(folder, text))
