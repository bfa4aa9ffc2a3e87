"""Tasks: restartable after a kill, the same for any number of workers, errors told, ranks that share the work."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from glm.data.tasks import run_tasks, worker_pool
from glm.errors import DataError, PlatformError

TASKS = {f"part-{i}": {"number": i} for i in range(12)}


def squares(given, folder):
    """A slow task that writes two files and counts its attempts beside the results."""
    number = given["number"]
    (folder / "first.txt").write_text(str(number))
    time.sleep(0.1)
    (folder / "second.txt").write_text(str(number**2))
    with (folder.parent.parent / "attempts").open("a") as attempts:
        attempts.write(f"{number}\n")
    return {"square": number**2}


def refuses(given, folder):
    (folder / "begun").write_text("")
    raise DataError(f"task {given['number']}", "an odd number", "an even one", "correct it")


def dies(given, folder):
    os.kill(os.getpid(), signal.SIGKILL)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    facts = run_tasks(folder, TASKS, squares, label="squares")
    assert list(facts) == list(TASKS) and facts["part-7"] == {"square": 49}
    return tree(folder)


def test_one_and_four_workers_give_the_same_bytes(undisturbed, tmp_path):
    with worker_pool(4) as pool:
        facts = run_tasks(tmp_path / "out", TASKS, squares, pool, label="squares")
    assert list(facts) == list(TASKS)
    assert tree(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("workers", [1, 2])
def test_after_a_kill_only_what_is_missing_is_done_and_the_bytes_are_the_same(undisturbed, tmp_path, workers):
    program = (
        "from pathlib import Path\nfrom glm.data.tasks import run_tasks, worker_pool\nfrom tests.data.test_tasks import TASKS, squares\n"
        f"if __name__ == '__main__':\n    with worker_pool({workers}) as pool:\n"
        f"        run_tasks(Path({str(tmp_path / 'out')!r}), TASKS, squares, pool, label='squares')\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(root)})
    attempts = tmp_path / "attempts"
    deadline = time.monotonic() + 60
    while len(attempts.read_text().split() if attempts.exists() else []) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.3)    # workers end with their parent
    before = attempts.read_text().split()
    finished = {path.parent.name for path in (tmp_path / "out").glob("part-*/facts.json")}
    assert 0 < len(finished) < len(TASKS)
    run_tasks(tmp_path / "out", TASKS, squares, label="squares")
    again = attempts.read_text().split()[len(before):]
    assert {f"part-{number}" for number in again} == set(TASKS) - finished
    assert tree(tmp_path / "out") == undisturbed


def test_a_result_made_for_another_input_is_made_again(tmp_path):
    run_tasks(tmp_path / "out", {"part-0": {"number": 3}, "part-1": {"number": 4}}, squares, label="squares")
    facts = run_tasks(tmp_path / "out", {"part-0": {"number": 5}, "part-1": {"number": 4}}, squares, label="squares")
    assert facts == {"part-0": {"square": 25}, "part-1": {"square": 16}}
    assert (tmp_path / "out/part-0/second.txt").read_text() == "25"
    assert (tmp_path / "attempts").read_text().split() == ["3", "4", "5"]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_task_raises_is_told_and_leaves_no_result(tmp_path, workers):
    with worker_pool(workers) as pool, pytest.raises(DataError, match="odd number"):
        run_tasks(tmp_path / "out", {"part-1": {"number": 1}}, refuses, pool, label="refuses")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_worker_that_dies_is_an_error_that_says_what_to_do(tmp_path):
    with worker_pool(2) as pool, pytest.raises(PlatformError, match="run the same command again"):
        run_tasks(tmp_path / "out", {"part-1": {"number": 1}}, dies, pool, label="dies")


def test_two_ranks_share_the_tasks_and_return_the_same(undisturbed, tmp_path):
    program = (
        "import json\nfrom pathlib import Path\nfrom glm.data.tasks import run_tasks\nfrom tests.data.test_tasks import TASKS, squares\n"
        f"print(json.dumps(run_tasks(Path({str(tmp_path / 'out')!r}), TASKS, squares, label='squares')))\n"
    )
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
                         env={**os.environ, "PYTHONPATH": str(root), "RANK": str(rank), "WORLD_SIZE": "2"})
        for rank in range(2)
    ]
    told = [json.loads(rank.communicate(timeout=60)[0]) for rank in ranks]
    assert told[0] == told[1] and list(told[0]) == list(TASKS)
    assert tree(tmp_path / "out") == undisturbed
    assert sorted(map(int, (tmp_path / "attempts").read_text().split())) == list(range(12))


def test_what_a_task_left_elsewhere_and_is_lost_is_made_again(tmp_path):
    tasks = {name: TASKS[name] for name in ("part-3", "part-4")}
    run_tasks(tmp_path / "out", tasks, squares, label="squares")
    run_tasks(tmp_path / "out", tasks, squares, label="squares", intact=lambda facts: (tmp_path / "attempts").read_text().count("4") > 1 or facts["square"] == 9)
    assert (tmp_path / "attempts").read_text().split() == ["3", "4", "4"]


def test_a_rank_does_not_wait_in_a_folder_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    gone = threading.Timer(0.3, lambda: shutil.rmtree(tmp_path / "out"))
    gone.start()
    with pytest.raises(PlatformError, match="removed while"):
        run_tasks(tmp_path / "out", {"part-0": {"number": 1}}, squares, label="squares")
