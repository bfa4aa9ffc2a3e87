"""Checkpoints that are not what was written, and processes killed at any moment: the run goes on from what is good."""

import random
import shutil

import pytest

from glm.checkpoint.manifest import MANIFEST, checkpoint_steps, verify
from glm.checkpoint.run_folder import RunFolder, write_json
from glm.errors import CheckpointError
from tests.train.forked import STAGE, Ranks, checkpoints, completed, numbers, part_of, refused, start_of, state_digests

NEXT = "pretrain_code_reasoning"


def flip(path, generator: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
    path.write_bytes(raw)


def truncate(path, generator: random.Random) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: generator.randrange(len(raw))])


def remove(path, generator: random.Random) -> None:
    path.unlink()


DAMAGES = (flip, truncate, remove)


def files(checkpoint) -> list:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def test_no_changed_bit_and_no_missing_byte_of_any_file_escapes(whole, tmp_path):
    generator = random.Random(0)
    good = checkpoints(whole) / "step_00000008"
    assert verify(good) and {path.suffix for path in files(good)} >= {".distcp", ".pt", ".json", ""}
    for path in files(good):
        for damage in (*[flip] * 8, truncate, remove):
            copy = tmp_path / "copy"
            shutil.copytree(good, copy)
            damage(copy / path.name, generator)
            with pytest.raises(CheckpointError):
                verify(copy)
            shutil.rmtree(copy)


def test_ranks_that_share_the_reading_read_every_byte(whole, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoints(whole) / "step_00000008", copy)
    for path in files(copy):
        raw = path.read_bytes()
        flip(path, random.Random(1))
        faults = 0
        for share in range(3):
            try:
                verify(copy, share, 3)
            except CheckpointError:
                faults += 1
        assert faults, path
        path.write_bytes(raw)


def falls_back(whole, text, damage, name: str, rollbacks: tuple[dict, ...] = ()) -> None:
    folder = part_of(whole, f"{damage.__name__}_{name.strip('.')}_{len(rollbacks)}", (2, 4))
    if rollbacks:
        write_json(RunFolder(folder).rollbacks(STAGE), rollbacks)
    bad = checkpoints(folder) / "step_00000004"
    damage(bad / name, random.Random(name))
    said = completed(folder, text, "checkpoint.keep=9")
    for part in ("CHECKPOINT step_00000004 IS NOT WHAT WAS WRITTEN", name, "found:", "expected:", "bad_step_00000004", "2 steps are lost",
                 "continues after step 2"):
        assert part in said, said
    assert (checkpoints(folder) / "bad_step_00000004").is_dir(), "it is kept to be looked at"
    assert sorted(numbers(folder)) == [3, 4, 5, 6, 7, 8] and numbers(folder).items() <= numbers(whole).items()
    assert state_digests(folder) == state_digests(whole)


@pytest.mark.parametrize("damage, name", [(flip, "__0_1.distcp"), (truncate, MANIFEST)], ids=str)
def test_a_bad_newest_checkpoint_is_set_aside_for_the_one_before(whole, text, damage, name):
    falls_back(whole, text, damage, name)


def test_a_torn_manifest_is_set_aside_too_when_the_stage_has_gone_back_before(whole, text):
    """Which checkpoints are of the path that was given up stands in their manifests. Here none is, and no row is left out."""
    falls_back(whole, text, truncate, MANIFEST, rollbacks=({"from_step": 6, "to_step": 4, "rows": []},))


@pytest.mark.full
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "common.pt", "metadata.json", MANIFEST])
def test_a_checkpoint_bad_in_any_file_is_set_aside_for_the_one_before(whole, text, damage, name):
    falls_back(whole, text, damage, name)


def test_a_stage_without_a_good_checkpoint_lists_them_and_touches_nothing(whole, text):
    folder = part_of(whole, "none_good", (2, 4))
    for step in (2, 4):
        flip(checkpoints(folder) / f"step_0000000{step}" / "__0_0.distcp", random.Random(step))
    said = refused(folder, text)
    assert "no checkpoint that is whole" in said and "step_00000002/__0_0.distcp" in said and "step_00000004/__0_0.distcp" in said
    assert checkpoint_steps(checkpoints(folder)) == [2, 4]


def test_a_stage_does_not_start_from_a_bad_end_of_its_parent(whole, text):
    """An older checkpoint of the parent would be taken for its end; the parent makes its end anew instead."""
    folder = part_of(whole, "bad_parent", (6, 8))
    flip(checkpoints(folder) / "step_00000008" / "__0_0.distcp", random.Random(0))
    said = refused(folder, text, stage=NEXT)
    assert "__0_0.distcp" in said and f"stages/{STAGE}/done.json and run again" in said
    assert "2 steps are lost" in completed(folder, text)
    assert state_digests(folder) == state_digests(whole)
    completed(folder, text, f"{NEXT}.tokens=512", stage=NEXT)


def killed_often(whole, text, name: str, kills: int, seed: int, *overrides: str) -> None:
    """Starts the stage again and again, kills it, lets it end at last. Every other kill waits for a save to be under way."""
    generator, folder = random.Random(seed), start_of(whole, name)
    for kill in range(kills):
        with Ranks(folder, text, *overrides) as ranks:
            if kill % 2:
                ranks.until(lambda: ranks.poll() or any(checkpoints(folder).glob(".step_*")))
            else:
                step = generator.randrange(9)
                ranks.until(lambda: ranks.poll() or max(numbers(folder), default=0) >= step)
            moment = generator.uniform(0, 0.2)
            try:
                ranks.wait(seconds=moment)
            except TimeoutError:    # it was killed
                pass
            else:
                break
    said = completed(folder, text, *overrides)
    assert "NOT WHAT WAS WRITTEN" not in said and "bit for bit" not in said
    assert not list(checkpoints(folder).glob(".step_*")), "drafts of killed saves are left"
    assert numbers(folder) == numbers(whole)
    assert state_digests(folder) == state_digests(whole)


def test_a_stage_killed_at_random_moments_ends_bitwise_like_one_that_was_not(whole, text):
    killed_often(whole, text, "killed_at_random", 4, 0, "checkpoint.every_steps=1")


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10))
def test_fifty_kills_at_random_moments_change_nothing(whole, text, seed):
    killed_often(whole, text, f"killed_{seed}", 5, seed, "checkpoint.every_steps=1")


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2))
def test_two_ranks_killed_at_random_moments_change_nothing(prepared, text, seed):
    two = (f"{STAGE}.launcher.ranks_per_node=2", f"{STAGE}.layout.ep=2")
    undisturbed = start_of(prepared, f"two_whole_{seed}")
    completed(undisturbed, text, *two)
    killed_often(undisturbed, text, f"two_killed_{seed}", 5, 100 + seed, "checkpoint.every_steps=1", *two)
