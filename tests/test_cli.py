"""The command line as a user meets it: in a process of its own."""

import errno
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glm.doctor import GIB, enough, judge_memory, judge_package, judge_shm, limited
from glm.errors import explain_os_error
from glm.platform.versions import BREAKS, OPTIONAL, PINNED, PLATFORM_TORCH
from glm.recipe.compose import load_run

ROOT = Path(__file__).parents[1]
TINY = "configs/glm45/tiny.yaml"
VERBS = ("run", "show", "check", "chat", "doctor", "report")


def glm(*words: str, seconds: float = 240) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "glm.cli", *words], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"}, capture_output=True,
        text=True, timeout=seconds, check=False,
    )


def lines(done: subprocess.CompletedProcess) -> list[dict]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def processor_seconds() -> float:
    """Of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_importing_the_command_line_takes_a_tenth_of_a_second_and_help_half_of_one():
    timer = "import time; start = time.process_time(); import glm.cli; print(time.process_time() - start)"    # a busy machine costs wall-clock time only
    imports = [float(subprocess.run([sys.executable, "-c", timer], cwd=ROOT, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert min(imports) < 0.1
    helps = []
    for _ in range(3):
        before = processor_seconds()
        assert glm("--help").returncode == 0
        helps.append(processor_seconds() - before)
    assert min(helps) < 0.5


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb):
    done = glm(verb, "--help")
    assert done.returncode == 0 and f"example: glm {verb}" in done.stdout
    assert verb in glm("--help").stdout


def test_recipes_and_launcher_do_not_import_torch():
    code = "import sys, glm.check, glm.launch.stages, glm.launch.local, glm.train.plan, glm.recipe.mixture; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("words", [
    ("run", "configs/glm45/tinny.yaml"), ("show", TINY, "pretrain_generel"), ("check", TINY, "sed=1"), ("run", TINY, "seed"), ("show", TINY),
])
def test_a_users_mistake_is_told_without_a_traceback_and_exits_2(words):
    done = glm(*words)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    assert all(part in done.stderr for part in ("found:", "expected:", "to do:"))


def test_show_prints_each_value_with_its_origin():
    done = glm("show", TINY, "pretrain_general", "schedule.peak_lr=1e-3")
    assert re.search(r"schedule\.peak_lr\W+0\.001\W+command line", done.stdout)
    assert re.search(r"losses\.mtp_weight\W+0\.3\W+configs/glm45/stage/pretrain_general\.yaml:\d+", done.stdout)
    assert re.search(r"optimizer\.clip_grad\W+1\.0\W+default", done.stdout)
    rows = {row["key"]: row for row in lines(glm("show", TINY, "rl_reasoning", "--json"))}
    assert rows["optimizer.frozen"]["value"] == ["embedding", "output", "router"] and rows["rl.steps"]["origin"].startswith(TINY)


def test_the_schedule_of_the_large_run_is_the_paper_s():
    rows = lines(glm("show", "configs/glm45/355b.yaml", "--schedule", "--json"))
    by_stage = {}
    for row in rows:
        by_stage.setdefault(row["stage"], []).append(row)
    first, last = by_stage["pretrain_general"][0], by_stage["midtrain_long_context"][-1]
    assert abs(first["batch_tokens"] - 16e6) < 1e6 and abs(last["batch_tokens"] - 64e6) < 2e6 and last["lr"] == pytest.approx(2.5e-5)
    assert [rows[0]["sequence_length"] for rows in by_stage.values()][:5] == [4096, 4096, 32768, 32768, 131072]


def test_check_without_a_name_checks_every_run_file():
    summaries = {row["run"]: row for row in lines(glm("check", "--json"))}
    assert {"tiny", "4b", "30b", "air", "355b"} <= set(summaries)
    large = summaries["355b"]
    assert large["parameters"]["total"] == 356_785_884_416 and large["parameters"]["total_without_mtp"] == 352_797_814_784
    assert large["parameters"]["active"] == 34_034_191_616 and large["parameters"]["conventions"]["body and MTP"]["total"] == 355_233_991_936
    assert {"4096", "32768", "131072"} <= set(large["flops_per_token"]) and summaries["air"]["kv_bytes_per_token"] == 184 * 1024
    memory = large["memory"]["pretrain_general"]
    assert memory["fits"] is True and [rank["pipeline_rank"] for rank in memory["ranks"]] == [0, 1, 2, 3]
    general = next(stage for stage in summaries["air"]["stages"] if stage["stage"] == "pretrain_general")
    assert general["tokens"] == 15 * 10**12 == sum(general["tokens_per_source"].values()) and general["steps"] > 200_000
    assert "2,284,864 parameters" in glm("check", TINY).stdout


def test_check_names_what_to_change_when_a_stage_does_not_fit():
    done = glm("check", "configs/glm45/4b.yaml", "midtrain_long_context.recompute=none", "--json")
    memory = json.loads(done.stdout)["memory"]
    assert done.returncode == 1 and [stage for stage, entry in memory.items() if not entry["fits"]] == ["midtrain_long_context"]
    assert memory["midtrain_long_context"]["suggestion"]["change"] == {"recompute": "selective"}
    done = glm("check", "configs/glm45/4b.yaml", "midtrain_long_context.recompute=none")
    assert "midtrain_long_context does not fit" in done.stdout and "set midtrain_long_context.recompute=selective" in done.stdout


def test_check_takes_another_hardware_file():
    done = glm("check", "configs/glm45/4b.yaml", "hardware=h200_8", "--json")
    assert {entry["ranks"][0]["ranks"] for entry in lines(done)[0]["memory"].values()} == {8}
    done = glm("check", TINY, "hardware=h200_128")
    assert done.returncode == 2 and "data-parallel ranks" in done.stderr, "a batch of 8 rows cannot be divided so"


def test_check_reads_all_files_and_names_every_wrong_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text("model: m\n")
    done = glm("check", str(tmp_path / "one.yaml"), TINY, str(tmp_path / "two.yaml"))
    assert done.returncode == 2 and "one.yaml" in done.stderr and "two.yaml" in done.stderr and "tiny" in done.stdout


def test_dry_run_prints_one_torchrun_line_a_stage_and_writes_nothing(tmp_path):
    done = glm("run", TINY, "--dry-run", f"run_folder={tmp_path / 'r'}")
    by_hand = [line for line in done.stdout.splitlines() if "torchrun " in line]
    assert done.returncode == 0 and len(by_hand) == len(load_run(ROOT / TINY).stages) and not (tmp_path / "r").exists()
    assert "written by `glm run`" in done.stderr
    assert f"torchrun --nnodes=1 --nproc-per-node=2 -m glm.rank {tmp_path}/r/stages/rl_reasoning/recipe.json" in done.stdout


def test_dry_run_quotes_for_a_shell(tmp_path):
    done = glm("run", TINY, "chat", "--dry-run", f"run_folder={tmp_path / 'my runs'}")
    line = next(line for line in done.stdout.splitlines() if "torchrun " in line)
    assert shlex.split(line)[-1] == str(tmp_path / "my runs" / "stages" / "chat" / "recipe.json")


def test_options_and_words_come_in_any_order_and_an_unknown_option_is_refused():
    first, second = (glm("show", *words) for words in ((TINY, "--json", "chat", "seed=3"), (TINY, "chat", "seed=3", "--json")))
    assert first.stdout == second.stdout and '"value": 3' in first.stdout
    assert "unrecognized arguments: --jsn" in glm("show", TINY, "chat", "--jsn").stderr
    assert "unrecognized arguments: b" in glm("report", "a", "b").stderr


def test_every_stage_of_the_tiny_run_has_an_executable_script_that_names_it():
    scripts = [path for folder in ("pretrain", "midtrain", "posttrain") for path in (ROOT / folder).glob("*.sh")]
    stages = []
    for script in scripts:
        assert os.access(script, os.X_OK), script
        stages += re.findall(r'exec "\$glm" run "\$runfile" (\w+) "\$@"', script.read_text())
    assert sorted(stages) == sorted(load_run(ROOT / TINY).stages)
    for words in (["seed=3"], ["configs/glm45/tiny.yaml", "seed=3"]):
        done = subprocess.run(["posttrain/rl_reasoning.sh", *words, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert "stages/rl_reasoning/recipe.json" in done.stdout, done.stderr


def test_doctor_names_every_subject_and_exits_with_1_if_one_is_wrong():
    done = glm("doctor", "--json")
    findings = {row["subject"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert {"Python", "torch", "device", "memory", "/dev/shm", "cores", "disk here"} <= set(findings)
    assert done.returncode == int(any(row["state"] == "wrong" for row in findings.values())), "whatever this machine's health"
    assert all(findings[name]["state"] != "wrong" for name in ("Python", "torch")), "these make setup has installed"
    assert "torch" in glm("doctor").stdout


def test_doctor_judges_packages_and_space():
    assert judge_package("rich", "1.0", "1.0+local", (), "tables", False).state == "fine"
    assert judge_package("rich", "1.0", "1.1", ("1.1",), "tables", False).state == "fine"
    other = judge_package("rich", "1.0", "2.0", (), "tables", False)
    assert other.state == "note" and "2.0 (pinned: 1.0)" in other.found and "tables" in other.breaks
    assert judge_package("rich", "1.0", None, (), "tables", False).state == "wrong"
    assert judge_package("rich", "1.0", None, (), "tables", True).state == "note"
    assert enough("disk", 3 * GIB, 5 * GIB, "checkpoints").state == "wrong" and enough("disk", 6 * GIB, 5 * GIB, "").state == "fine"
    assert enough("memory", None, GIB, "").state == "note"


def test_doctor_tells_a_small_machine_from_a_busy_one():
    assert [judge_memory(total * GIB, available * GIB).state for total, available in ((16, 12), (6, 5), (16, 2), (4, 4))] == [
        "fine", "fine", "note", "wrong"]
    assert judge_memory(None, None).state == "note" and "2.0 GiB free of 16.0 GiB" in judge_memory(16 * GIB, 2 * GIB).found
    assert [judge_shm(size).state for size in (GIB, 64 << 20, 32 << 20, None)] == ["fine", "note", "wrong", "note"]
    assert limited(64 * GIB, 60 * GIB, "max", GIB, "") == (64 * GIB, 60 * GIB)
    stat = f"anon 1\ninactive_file {3 * GIB}\nactive_file 5\n"
    assert limited(64 * GIB, 60 * GIB, str(8 * GIB), 5 * GIB, stat) == (8 * GIB, 6 * GIB), "cached files are free for the asking"
    assert limited(64 * GIB, GIB, str(8 * GIB), 5 * GIB, stat) == (8 * GIB, GIB)


def test_pinned_versions_are_those_that_are_installed_by_make_setup():
    required = {}
    for name in ("host.txt", "host-no-deps.txt"):
        for name_, version in re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)", (ROOT / "requirements" / name).read_text(), re.MULTILINE):
            required[name_.lower()] = version
    assert {name: required.get(name.lower()) for name in PINNED} == PINNED
    assert set(BREAKS) == set(PINNED) and OPTIONAL <= set(PINNED)
    assert PLATFORM_TORCH["cuda"] in (ROOT / "requirements" / "cuda.txt").read_text()


@pytest.mark.parametrize("below", ["", "run", "some/run"])
def test_a_run_folder_that_cannot_be_made_is_told_without_a_traceback(tmp_path, below):
    (tmp_path / "file").touch()
    done = glm("run", TINY, "tokenizer", f"run_folder={tmp_path / 'file' / below}")
    assert done.returncode == 2 and "Traceback" not in done.stderr and str(tmp_path / "file") in done.stderr
    assert all(part in done.stderr for part in ("found:", "expected:", "to do:"))


def test_an_interrupt_stops_a_run_that_a_shell_started_in_the_background(tmp_path):
    """A shell without job control starts `command &` with SIGINT ignored, and what it starts inherits that."""
    started = tmp_path / "run" / "stages" / "tokenizer" / "started.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "glm.cli", "run", TINY, "tokenizer", f"run_folder={tmp_path / 'run'}"], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    deadline = time.monotonic() + 60
    while not started.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert "stopped in tokenizer" in process.communicate(timeout=60)[1] and process.returncode == 130


def test_a_full_disk_is_explained_and_other_failures_of_the_system_are_not():
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        told = explain_os_error(OSError(number, os.strerror(number), "x/weights"))
        assert told.where == "x/weights" and told.expected == "room on the disk" and told.found == os.strerror(number)
    assert explain_os_error(OSError(errno.EROFS, "Read-only file system", "x")).found == "Read-only file system"
    assert explain_os_error(OSError(errno.EACCES, "Permission denied")) is None, "no file: a socket, say"
    assert explain_os_error(OSError(errno.EIO, "Input/output error", "x")) is None


def test_report_of_a_folder_that_is_no_run_is_a_users_mistake(tmp_path):
    done = glm("report", str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
