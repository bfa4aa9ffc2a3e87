"""Real processes: ranks that end, fail, hang, and a launcher that is killed. No process may be left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from glm.errors import PlatformError
from glm.launch.local import Interrupted, RankFailed, run_ranks

ROOT = Path(__file__).parents[2]
LIFETIME = ROOT / "glm" / "platform" / "lifetime.py"
START = """
import importlib.util, os, pathlib, signal, subprocess, sys, time
spec = importlib.util.spec_from_file_location("lifetime", LIFETIME)    # alone: its package would import torch
lifetime = importlib.util.module_from_spec(spec); spec.loader.exec_module(lifetime); lifetime.die_with_parent()
signal.signal(signal.SIGINT, signal.default_int_handler)    # as glm.rank does
rank, here = os.environ["RANK"], pathlib.Path(HERE)
def put(name, text):
    (here / f".{name}").write_text(str(text)); (here / f".{name}").rename(here / name)
def wait_for(*names):
    while not all((here / name).exists() for name in names): time.sleep(0.02)
put(f"pid_{rank}", os.getpid())
"""


def rank_program(folder: Path, body: str) -> list[str]:
    """The command of a rank that writes its process id to pid_RANK and then runs ``body``."""
    program = folder / "program.py"
    program.write_text(f"LIFETIME, HERE = {str(LIFETIME)!r}, {str(folder)!r}\n{START}{textwrap.dedent(body)}")
    return [sys.executable, str(program)]


def wait_for(*files: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"none of {[file.name for file in files if not file.exists()]} after {seconds} s"
        time.sleep(0.02)


def pids(folder: Path, count: int, seconds: float = 20) -> list[int]:
    """Process ids of the ranks, once all have started."""
    files = [folder / f"pid_{rank}" for rank in range(count)]
    wait_for(*files, seconds=seconds)
    return [int(file.read_text()) for file in files]


def alive(pid: int) -> bool:
    """Running: neither gone nor a zombie nobody has reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_gone(processes: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(alive, processes)):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in processes if alive(pid)]}"
        time.sleep(0.02)


def launcher(folder: Path, command: list[str], world_size: int = 2, grace_seconds: float = 20) -> subprocess.Popen:
    """A process of its own that runs the ranks, to be killed."""
    code = (
        "import signal, sys\nfrom pathlib import Path\nfrom glm.launch.local import Interrupted, run_ranks\n"
        "from glm.launch.signals import Requeued\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"try: run_ranks({command!r}, {world_size}, Path({str(folder)!r}), stage='s', grace_seconds={grace_seconds})\n"
        "except Interrupted: sys.exit(130)\nexcept Requeued as stopped: sys.exit(75 if stopped.saved else 76)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_every_rank_gets_the_variables_of_torchrun_and_its_own_log(tmp_path, capfd):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    command = rank_program(tmp_path, f"print(*[os.environ[name] for name in {names!r}], int(os.environ['MASTER_PORT']) > 0)")
    run_ranks(command, 3, tmp_path, stage="s", threads_per_rank=2)
    assert capfd.readouterr().out == "0 0 3 127.0.0.1 2 True\n", "rank 0 writes to the terminal"
    assert [(tmp_path / f"rank_{rank}.log").read_text() for rank in (1, 2)] == ["1 1 3 127.0.0.1 2 True\n", "2 2 3 127.0.0.1 2 True\n"]


def test_a_rank_that_fails_stops_the_others_and_is_named_with_its_last_words(tmp_path):
    command = rank_program(tmp_path, """
        wait_for("pid_0", "pid_1")
        if rank == "1":
            print("early"); sys.exit("the reason")
        time.sleep(60)
    """)
    started = time.monotonic()
    with pytest.raises(PlatformError) as caught:
        run_ranks(command, 2, tmp_path, stage="pretrain_general")
    assert time.monotonic() - started < 30, "the sleeping rank was waited for"
    assert caught.value.where == "stage pretrain_general, rank 1" and "exited with code 1" in caught.value.found
    assert "| early" in caught.value.todo and "| the reason" in caught.value.todo and "rank_1.log" in caught.value.todo
    assert_gone(pids(tmp_path, 2), 10)


def test_a_killed_rank_is_named_with_its_signal_and_one_that_ignores_sigterm_goes_too(tmp_path):
    command = rank_program(tmp_path, """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        wait_for("pid_0", "pid_1")
        if rank == "1": os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    """)
    started = time.monotonic()
    with pytest.raises(PlatformError) as caught:
        run_ranks(command, 2, tmp_path, stage="s")
    assert "rank 1" in caught.value.where and "killed by SIGKILL" in caught.value.found and time.monotonic() - started < 30
    assert_gone(pids(tmp_path, 2), 10)


def test_the_children_of_a_stopped_rank_are_stopped_with_it(tmp_path):
    command = rank_program(tmp_path, """
        if rank == "0":
            child = subprocess.Popen(["sleep", "60"])
            put("child", child.pid)
            time.sleep(60)
        wait_for("child")
        sys.exit(3)
    """)
    with pytest.raises(PlatformError, match="code 3"):
        run_ranks(command, 2, tmp_path, stage="s")
    assert_gone([int((tmp_path / "child").read_text())], 10)


@pytest.mark.parametrize("code", [0, 3])
def test_the_children_of_a_rank_that_ended_by_itself_are_stopped_too(tmp_path, code):
    command = rank_program(tmp_path, f"""
        if rank == "0":
            child = subprocess.Popen(["sleep", "60"])
            put("child", child.pid)
            sys.exit({code})
        wait_for("child")
    """)
    try:
        run_ranks(command, 2, tmp_path, stage="s")
        assert code == 0
    except PlatformError as failed:
        assert "code 3" in failed.found and code == 3
    assert_gone([int((tmp_path / "child").read_text())], 10)


def test_ranks_die_when_the_launcher_is_killed(tmp_path):
    process = launcher(tmp_path, rank_program(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"))
    started = pids(tmp_path, 2)
    assert all(map(alive, started))
    process.kill()
    process.wait()
    assert_gone(started, 10)


def test_a_rank_whose_launcher_died_before_it_could_ask_dies_at_once(tmp_path):
    command = rank_program(tmp_path, "time.sleep(60)")
    process = subprocess.Popen(command, env=os.environ | {"RANK": "0", "GLM_PARENT_PID": "1"})
    assert process.wait(timeout=20) == -signal.SIGKILL and not (tmp_path / "pid_0").exists()


def test_an_interrupt_reaches_the_ranks_and_is_waited_for(tmp_path):
    command = rank_program(tmp_path, """
        try:
            put(f"ready_{rank}", "")
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(0.3); put(f"saved_{rank}", ""); sys.exit(130)
    """)
    process = launcher(tmp_path, command)
    started = pids(tmp_path, 2)
    wait_for(tmp_path / "ready_0", tmp_path / "ready_1")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists(), "the ranks had time to end by themselves"
    assert_gone(started, 10)


@pytest.mark.parametrize(("number", "body", "code"), [
    (signal.SIGTERM, "signal.signal(signal.SIGTERM, lambda *_: (put(f'saved_{rank}', ''), sys.exit(75)))", 75),
    (signal.SIGUSR1, "signal.signal(signal.SIGTERM, lambda *_: (put(f'saved_{rank}', ''), sys.exit(75)))", 75),
    (signal.SIGTERM, "signal.signal(signal.SIGTERM, lambda *_: rank == '1' and sys.exit(75))", 75),
    (signal.SIGTERM, "", 76),
    (signal.SIGTERM, "signal.signal(signal.SIGTERM, signal.SIG_IGN)", 76),
])
def test_a_schedulers_signal_asks_the_ranks_to_save_and_tells_whether_they_did(tmp_path, number, body, code):
    process = launcher(tmp_path, rank_program(tmp_path, f"{body}\nput(f'ready_{{rank}}', '')\ntime.sleep(60)"), grace_seconds=10 if code == 75 else 1)
    started = pids(tmp_path, 2)
    wait_for(tmp_path / "ready_0", tmp_path / "ready_1")
    process.send_signal(number)
    assert process.wait(timeout=30) == code, "75 saved, 76 not"
    assert code == 76 or "saved" not in body or (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists()
    assert_gone(started, 10)


def test_a_rank_that_says_why_all_end_is_named_before_one_that_lost_its_peer_and_the_others_may_end_by_themselves(tmp_path):
    command = rank_program(tmp_path, """
        wait_for("pid_0", "pid_1")
        if rank == "1": sys.exit(77)
        os.kill(os.getpid(), signal.SIGSTOP)    # woken up to tell where it stands
        put("told", ""); sys.exit(1)
    """)
    with pytest.raises(RankFailed) as caught:
        run_ranks(command, 2, tmp_path, stage="s")
    assert caught.value.code == 77 and "rank 1" in caught.value.where and (tmp_path / "told").exists()


def test_interrupted_is_not_a_users_mistake():
    assert not issubclass(Interrupted, ValueError)
