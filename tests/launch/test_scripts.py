"""The shell around `glm run`: correct for a shell, and the requeue logic run for real with stand-ins for Slurm's commands."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glm.cli import main
from glm.errors import REQUEUE_CODE
from glm.launch.scripts import JOB, REQUEUE, SUBMIT, job_script, ranks_by_hand, requeue_script, scripts, submit_script
from glm.recipe.compose import load_run

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "glm45"
RUN_FILES = sorted(CONFIGS.glob("*.yaml"))
SHELLCHECK = Path(sys.executable).with_name("shellcheck")


def check(files: list[Path]) -> None:
    """shellcheck finds nothing, not even in style, and bash can read them."""
    done = subprocess.run([SHELLCHECK, "--shell=bash", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for file in files:
        assert subprocess.run(["bash", "-n", file], capture_output=True, text=True).stderr == ""


def test_every_shell_script_of_the_repository_is_correct():
    stage_scripts = [path for folder in ("pretrain", "midtrain", "posttrain") for path in sorted((ROOT / folder).glob("*.sh"))]
    others = [path for path in (ROOT / ".ci").iterdir() if path.read_bytes().startswith(b"#!/usr/bin/env bash")]
    assert len(stage_scripts) >= 10 and others
    check(stage_scripts + others)


def test_the_scripts_of_every_run_file_are_correct_for_a_shell_also_where_names_have_spaces(tmp_path):
    written = []
    for path in RUN_FILES:
        run = dataclasses.replace(load_run(path), run_folder=tmp_path / path.stem / "John's run")
        by_hand = {"ranks.sh": "#!/usr/bin/env bash\n" + ranks_by_hand(run, list(run.stages))}
        texts = scripts(run, list(run.stages), ["data.documents=/my texts"]) | by_hand
        for name, text in texts.items():
            written.append(tmp_path / path.stem / name)
            written[-1].parent.mkdir(exist_ok=True)
            written[-1].write_text(text)
    check(written)
    (tmp_path / "broken.sh").write_text("#!/usr/bin/env bash\nif [ $1 = x ]; then echo\n")
    with pytest.raises(AssertionError):
        check([tmp_path / "broken.sh"])


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_a_job_asks_for_the_nodes_and_devices_of_its_largest_stage_before_its_first_command(path):
    run = load_run(path)
    lines = job_script(run, list(run.stages), "true").splitlines()
    header = [line for line in lines if line.startswith("#SBATCH ")]
    first_command = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(lines.index(line) < first_command for line in header)
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in header)
    ranks = max(recipe.world_size for recipe in run.stages.values())
    launcher = max(run.stages.values(), key=lambda recipe: recipe.world_size).launcher
    if "gpus-per-node" in options:
        assert int(options["nodes"]) * int(options["gpus-per-node"]) == ranks
    assert "requeue" in options and options["signal"] == f"B:USR1@{launcher.grace_seconds + 60}" and options["open-mode"] == "append"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for scontrol and sbatch that write down their words; sbatch numbers its jobs from 101."""
    calls = tmp_path / "calls"
    calls.write_text("")
    (tmp_path / "bin").mkdir()
    for name, body in (("scontrol", ""), ("sbatch", f'echo $((100 + $(grep -c "^sbatch" {calls})))')):
        (tmp_path / "bin" / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {calls}\n{body}\n')
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    return lambda: calls.read_text().splitlines()


def stage(tmp_path: Path, body: str) -> str:
    """A command in the place of `glm run`: says when it runs, and notes the signals it gets."""
    path = tmp_path / "stage"
    path.write_text(f"#!/usr/bin/env bash\necho started \"$@\" >> {tmp_path}/log\n{body}\n")
    path.chmod(0o755)
    return str(path)


def start(tmp_path: Path, text: str, *words: str) -> subprocess.Popen:
    script = tmp_path / "script"
    script.write_text(text)
    return subprocess.Popen(["bash", script, *words], stderr=subprocess.PIPE, text=True)


def log(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []


def until_started(tmp_path: Path) -> None:
    deadline = time.monotonic() + 30
    while "ready" not in log(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.02)


RUN = load_run(CONFIGS / "air.yaml")
WAITS = "trap 'echo {0} >> {1}/log; sleep 0.3; exit {2}' {0}; echo ready >> {1}/log; while :; do sleep 0.05; done"


@pytest.mark.parametrize("code, calls", [(0, []), (REQUEUE_CODE, ["scontrol requeue 4711"]), (1, []), (2, []), (137, [])])
def test_a_job_is_queued_again_after_the_requeue_code_and_no_other(tmp_path, slurm, code, calls):
    job = start(tmp_path, job_script(RUN, ["pretrain_general"], stage(tmp_path, f"exit {code}")), "pretrain_general")
    job.communicate(timeout=60)
    assert (job.returncode, slurm(), log(tmp_path)) == (code, calls, ["started pretrain_general"])


def test_an_array_task_is_queued_again_under_its_own_number(tmp_path, slurm, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "50")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    start(tmp_path, job_script(RUN, ["pretrain_general"], stage(tmp_path, "exit 75"))).communicate(timeout=60)
    assert slurm() == ["scontrol requeue 50_3"]


@pytest.mark.parametrize("times", [1, 2])
def test_usr1_reaches_the_stage_the_job_waits_until_it_has_saved_and_is_queued_again(tmp_path, slurm, times):
    job = start(tmp_path, job_script(RUN, ["pretrain_general"], stage(tmp_path, WAITS.format("USR1", tmp_path, 75))))
    until_started(tmp_path)
    for _ in range(times):
        job.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
    assert job.poll() is None, "it waits"
    assert "asking the stage to save" in job.communicate(timeout=60)[1]
    assert (job.returncode, slurm()) == (75, ["scontrol requeue 4711"]) and log(tmp_path).count("USR1") >= 1


def test_a_cancelled_job_saves_and_is_not_queued_again(tmp_path, slurm):
    job = start(tmp_path, job_script(RUN, ["pretrain_general"], stage(tmp_path, WAITS.format("TERM", tmp_path, 75))))
    until_started(tmp_path)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert (job.returncode, slurm()) == (75, []) and "TERM" in log(tmp_path)


def test_a_signal_before_the_stage_can_listen_queues_the_job_again(tmp_path, slurm):
    """The first thing the job does is to be told to stop: by its own command, before that has a trap."""
    job = start(tmp_path, job_script(RUN, ["pretrain_general"], stage(tmp_path, "kill -s USR1 $PPID; sleep 20 & wait $!")))
    job.communicate(timeout=60)
    assert (job.returncode, slurm(), log(tmp_path)) == (75, ["scontrol requeue 4711"], ["started"])


def test_a_stage_that_fails_while_it_should_save_is_not_queued_again(tmp_path, slurm):
    job = start(tmp_path, job_script(RUN, ["pretrain_general"], stage(tmp_path, WAITS.format("USR1", tmp_path, 1))))
    until_started(tmp_path)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    assert (job.returncode, slurm()) == (1, [])


ALONE = """model: tiny
hardware: host
launcher: {kind: slurm, nodes: 2, ranks_per_node: 1, grace_seconds: 20, max_restarts: 0}
stages: {pretrain_general: {sequence_length: 64}}
"""
SRUN = """trap '' TERM
echo ready >> {0}/log
until [ -e {1}/stop ]; do [ ! -e {0}/fail ] || exit 1; sleep 0.05; done
echo saved >> {0}/log
echo {{}} > {1}/requeue.json
exit 1"""


@pytest.mark.parametrize("how", ["USR1", "a rank fails"])
def test_glm_run_inside_a_job_asks_srun_s_ranks_to_save_and_only_then_the_job_is_queued_again(tmp_path, slurm, monkeypatch, how):
    """All of it but Slurm: the job's script, `glm run`, its supervisor. srun and torchrun keep no exit codes, so the stand-in keeps none."""
    for axis in ("model", "stage", "hardware", "mixture"):
        (tmp_path / axis).symlink_to(CONFIGS / axis)
    (tmp_path / "one.yaml").write_text(ALONE)
    run = load_run(tmp_path / "one.yaml", [f"run_folder={tmp_path / 'run'}"])
    (tmp_path / "bin" / "srun").write_text("#!/usr/bin/env bash\n" + SRUN.format(tmp_path, tmp_path / "run/stages/pretrain_general") + "\n")
    (tmp_path / "bin" / "srun").chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    job = start(tmp_path, scripts(run, list(run.stages), [f"run_folder={tmp_path / 'run'}"])[JOB], "pretrain_general")
    until_started(tmp_path)
    if how == "USR1":
        job.send_signal(signal.SIGUSR1)
    else:
        (tmp_path / "fail").touch()
    told = job.communicate(timeout=60)[1]
    queued = [call for call in slurm() if call.startswith("scontrol requeue")]
    if how == "USR1":
        assert (job.returncode, queued, log(tmp_path)) == (75, ["scontrol requeue 4711"], ["ready", "saved"]), told
    else:
        assert job.returncode == 2 and queued == [] and "srun ended with code 1" in told


@pytest.mark.parametrize("codes, runs, end", [([75, 75, 0], 3, 0), ([1], 1, 1), ([75, 2], 2, 2)])
def test_without_slurm_a_loop_starts_again_after_the_requeue_code(tmp_path, codes, runs, end):
    body = f"codes=({' '.join(map(str, codes))}); exit \"${{codes[$(($(wc -l < {tmp_path}/log) - 1))]}}\""
    loop = start(tmp_path, requeue_script(RUN, list(RUN.stages), stage(tmp_path, body)), "seed=3")
    loop.communicate(timeout=60)
    assert (loop.returncode, log(tmp_path)) == (end, ["started seed=3"] * runs)


def test_without_slurm_sigterm_saves_and_ends_the_loop_and_usr1_goes_on(tmp_path):
    body = f"[ $(grep -c started {tmp_path}/log) -lt 2 ] || exit 0\n" + WAITS.format("USR1", tmp_path, 75)
    loop = start(tmp_path, requeue_script(RUN, ["pretrain_general"], stage(tmp_path, body)))
    until_started(tmp_path)
    loop.send_signal(signal.SIGUSR1)
    loop.communicate(timeout=60)
    assert loop.returncode == 0 and log(tmp_path) == ["started pretrain_general", "ready", "USR1", "started pretrain_general"]
    (tmp_path / "log").unlink()
    loop = start(tmp_path, requeue_script(RUN, ["pretrain_general"], stage(tmp_path, WAITS.format("TERM", tmp_path, 75))))
    until_started(tmp_path)
    loop.send_signal(signal.SIGTERM)
    loop.communicate(timeout=60)
    assert loop.returncode == 75 and log(tmp_path).count("started pretrain_general") == 1


def test_stages_are_submitted_one_after_the_other_with_the_nodes_each_needs(tmp_path, slurm):
    run = load_run(CONFIGS / "air.yaml", [f"run_folder={tmp_path / 'run'}"])
    (tmp_path / "run" / "launch").mkdir(parents=True)
    done = start(tmp_path, submit_script(run, list(run.stages)), "--partition=gpu")
    done.communicate(timeout=60)
    calls = slurm()
    assert done.returncode == 0 and len(calls) == len(run.stages)
    for index, (call, name) in enumerate(zip(calls, run.stages)):
        assert call.endswith(f"{JOB} {name}") and "--parsable" in call and "--partition=gpu" in call
        assert ("--nodes=1 " in call) == (run.stages[name].world_size == 1)
        assert re.findall(r"--dependency=afterok:(\d+)", call) == ([str(100 + index)] if index else [])


def test_a_dry_run_prints_the_scripts_it_would_write_and_writes_them_when_asked(tmp_path, capsys):
    words = ["run", str(CONFIGS / "air.yaml"), "pretrain_general", f"run_folder={tmp_path / 'run'}"]
    assert main([*words, "--dry-run"]) == 0 and not (tmp_path / "run").exists()
    printed = capsys.readouterr().out
    assert "srun --nodes=32" in printed and "#SBATCH --nodes=32" in printed and "scontrol requeue" in printed
    assert printed.count("submit --job-name=") == 1, "of the stages that are named"
    assert main([*words, "--dry-run", "--write"]) == 0
    assert {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()} == {
        f"launch/{name}" for name in (JOB, SUBMIT, REQUEUE)}
    for name in (JOB, SUBMIT, REQUEUE):
        assert os.access(tmp_path / "run" / "launch" / name, os.X_OK) and (tmp_path / "run" / "launch" / name).read_text() in printed
