"""``glm run`` over a folder: what is skipped, what is refused, what is written. The ranks are real, their work is not."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from glm.checkpoint.run_folder import RunFolder
from glm.errors import PlatformError, RecipeError
from glm.launch.cluster import command_line, run_on_cluster
from glm.launch.signals import Requeued, StopSignals
from glm.launch.stages import lock, run_stages
from glm.recipe.compose import load_recipe, load_run
from tests.runs import UNPREPARED

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "glm45" / "tiny.yaml"
WORK = "import json, os, sys; recipe = json.load(open(sys.argv[1])); " \
       "open(os.path.join(recipe['run_folder'], 'log'), 'a').write(recipe['stage'] + os.environ['RANK'] + ' ')"


class Runs:
    """The same run file, again and again in one folder."""

    def __init__(self, folder: Path):
        self.folder, self.said, self.program = RunFolder(folder), [], WORK

    def __call__(self, stages: str = "", *overrides: str) -> list[str]:
        """Runs, and returns what ranks did: ``["tokenizer0", ...]``."""
        run = load_run(TINY, [f"run_folder={self.folder.root}", UNPREPARED, "pretrain_code_reasoning.data.mixture=plain_text", *overrides])
        log = self.folder.root / "log"
        log.unlink(missing_ok=True)
        run_stages(run, stages.split(), say=self.said.append, command=lambda recipe: [sys.executable, "-c", self.program, str(recipe)])
        return log.read_text().split() if log.exists() else []


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path / "run")


def test_stages_run_once_in_order_on_their_ranks_and_are_skipped_afterwards(runs):
    did = runs("pretrain_general tokenizer")
    assert did[0] == "tokenizer0" and sorted(did[1:]) == ["pretrain_general0", "pretrain_general1"]
    done = json.loads(runs.folder.done("pretrain_general").read_text())
    assert done["fingerprint"] == load_run(TINY, [UNPREPARED]).fingerprints()["pretrain_general"] and done["seconds"] >= 0
    assert load_recipe(runs.folder.recipe("pretrain_general")).run_folder == str(runs.folder.root)
    assert sorted(runs("tokenizer pretrain_general pretrain_code_reasoning")) == ["pretrain_code_reasoning0", "pretrain_code_reasoning1"]
    assert "tokenizer: done before, skipped" in runs.said
    assert runs("tokenizer", "logging.every_steps=9", "checkpoint.keep=1") == []


def test_a_stage_made_with_another_recipe_is_refused_before_anything_runs(runs):
    runs("tokenizer pretrain_general")
    with pytest.raises(RecipeError) as caught:
        runs("", "pretrain_general.schedule.peak_lr=1e-3", "pretrain_general.tokens=8192")
    assert "schedule.peak_lr: 0.01 -> 0.001\n            tokens: 768000 -> 8192" in caught.value.found
    assert "run_folder=PATH" in caught.value.todo and f"rm -r {runs.folder.stage('pretrain_general')}" in caught.value.todo
    assert not (runs.folder.root / "log").exists()


def test_a_stage_that_broke_off_continues_with_the_same_recipe_only(runs):
    runs.program = "raise SystemExit(7)"
    with pytest.raises(PlatformError, match="rank 0\n.*code 7"):
        runs("tokenizer")
    assert not runs.folder.done("tokenizer").exists()
    runs.program = WORK
    with pytest.raises(RecipeError, match="tokenizer.sample_bytes: 8000000 -> 1000000"):
        runs("tokenizer", "tokenizer.tokenizer.sample_bytes=1M")
    assert runs("tokenizer") == ["tokenizer0"]


def test_a_child_of_a_parent_that_was_made_anew_with_another_recipe_is_refused(runs):
    runs("tokenizer pretrain_general")
    subprocess.run(["rm", "-r", runs.folder.stage("tokenizer")], check=True)
    runs("tokenizer", "tokenizer.tokenizer.sample_bytes=1M")
    with pytest.raises(RecipeError) as caught:
        runs("pretrain_general", "tokenizer.tokenizer.sample_bytes=1M")
    assert "nothing of its own, but of tokenizer" in caught.value.found


def test_a_stage_without_its_parent_says_which_one_is_missing(runs):
    runs("tokenizer")
    with pytest.raises(RecipeError) as caught:
        runs("midtrain_repo_code")
    assert caught.value.found == "pretrain_code_reasoning is not done"


@pytest.mark.parametrize(("override", "found"), [
    ("sft_cold_start.kernels.attention=te", "te with platform: host"), ("rl_reasoning.engine.tp=2", "2"),
    ("rl_reasoning.rollout.max_staleness=1", "1"), ("export.logging.wandb=offline", "offline, but wandb is not installed"),
])
def test_what_a_later_stage_would_be_refused_for_is_refused_before_the_first_one(runs, override, found, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises((PlatformError, RecipeError)) as caught:
        runs("", override)
    assert caught.value.found == found and not (runs.folder.root / "stages").exists()
    assert runs("tokenizer", override) == ["tokenizer0"], "a stage that is not selected refuses nothing"


def test_an_unknown_stage_is_named_with_the_nearest(runs):
    with pytest.raises(RecipeError, match="did you mean `rl_reasoning`"):
        runs("rl_reasonin")


def test_a_done_file_that_is_torn_is_told(runs):
    runs("tokenizer")
    runs.folder.done("tokenizer").write_text('{"fing')
    with pytest.raises(RecipeError, match="not whole"):
        runs("tokenizer")


def test_two_runs_in_one_folder_are_refused_and_a_dead_one_holds_nothing(runs):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from glm.launch.stages import lock\n"
         "with lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()", str(runs.folder.root)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(PlatformError, match=f"in use by another `glm run` .process {holder.pid}"):
        runs("tokenizer")
    holder.kill()
    holder.communicate()
    assert runs("tokenizer") == ["tokenizer0"]
    with lock(runs.folder.root), pytest.raises(PlatformError):
        with lock(runs.folder.root):
            pass


def test_a_stop_while_a_dead_stage_waits_for_its_restart_is_not_told_as_saved(runs):
    runs.program = "import os; os.kill(os.getpid(), 9)"
    threading.Thread(target=stop_once_restarting, args=(runs, os.getpid()), daemon=True).start()
    with pytest.raises(Requeued) as caught:
        runs("tokenizer")
    assert not caught.value.saved and len([line for line in runs.said if "starts again" in line]) == 1


def stop_once_restarting(runs: Runs, pid: int) -> None:
    while not any("starts again" in line for line in runs.said):
        time.sleep(0.02)
    os.kill(pid, signal.SIGTERM)


def test_a_cluster_stage_is_started_by_srun_inside_an_allocation_only(tmp_path, monkeypatch, capfd):
    recipe = load_run(ROOT / "configs" / "glm45" / "air.yaml").stages["pretrain_general"]
    line = command_line(recipe, Path("r.json"))
    assert "srun --nodes=32 --ntasks-per-node=1" in line and "--nproc-per-node=8" in line and line.endswith("-m glm.rank r.json")
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(PlatformError, match="sbatch --nodes=32 --gpus-per-node=8"):
        run_on_cluster(recipe, Path("r.json"), StopSignals())
    for name, body in (("srun", 'echo "$@"; exit $CODE'), ("scontrol", "echo first; echo second")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("CODE", "0")
    run_on_cluster(recipe, Path("r.json"), StopSignals())
    assert "--rdzv-endpoint=first:29500" in capfd.readouterr().out
    monkeypatch.setenv("CODE", "4")
    with pytest.raises(PlatformError, match="srun ended with code 4; no rank could say why") as caught:
        run_on_cluster(recipe, Path("r.json"), StopSignals())
    assert caught.value.code < 0, "a rank that leaves no code was killed"


def test_the_code_of_a_clusters_first_failed_rank_is_the_one_it_left_not_sruns(tmp_path, monkeypatch):
    recipe = load_run(ROOT / "configs" / "glm45" / "air.yaml", [f"run_folder={tmp_path / 'run'}"]).stages["pretrain_general"]
    saved = RunFolder(tmp_path / "run").recipe("pretrain_general")
    saved.parent.mkdir(parents=True)
    saved.write_text("{}")
    rank = f"PYTHONPATH={ROOT} {sys.executable} -m glm.rank {saved}"
    for name, text in (("srun", f"RANK=3 {rank}; RANK=0 {rank}; exit 1"), ("scontrol", "echo first")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    with pytest.raises(PlatformError, match="srun ended with code 1; rank 3 exited first, with code 2") as caught:
        run_on_cluster(recipe, saved, StopSignals())
    assert caught.value.code == 2


def test_a_cluster_stage_is_asked_to_stop_by_a_file_and_tells_by_one_that_it_saved(tmp_path, monkeypatch):
    """srun keeps neither signals nor codes of ranks: a stand-in for it waits for the one file and leaves the other."""
    changes = [f"run_folder={tmp_path / 'run'}", "pretrain_general.launcher.grace_seconds=20"]
    recipe = load_run(ROOT / "configs" / "glm45" / "air.yaml", changes).stages["pretrain_general"]
    folder = RunFolder(tmp_path / "run").stage("pretrain_general")
    folder.mkdir(parents=True)
    body = f"touch {folder}/waits; while [ ! -e {folder}/stop ]; do sleep 0.05; done; echo '{{}}' > {folder}/requeue.json; exit 1"
    for name, text in (("srun", body), ("scontrol", "echo first")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    with StopSignals() as stop, pytest.raises(Requeued) as caught:
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
        run_on_cluster(recipe, Path("r.json"), stop)
    assert stop.asked == "SIGUSR1" and caught.value.saved
