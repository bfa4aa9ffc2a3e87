"""Work on a large input, cut into tasks: in parallel, restartable, with the same result for any number of workers.

A task is a name and what it works on. Its result is a folder that gets its name when it is whole, together with the task's facts
(counts and what else the caller asks for); what a killed process began stays under a hidden name and is removed. Run again, only
tasks without a result are done. Several ranks (``launcher.nodes``, ``ranks_per_node``) that share the folder each take
every n-th task and wait for the others' results, so that all return the same.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from glm.checkpoint.run_folder import sync, write_json
from glm.errors import DataError, PlatformError
from glm.platform.lifetime import die_with_parent
from glm.platform.ranks import place

FACTS = "facts.json"
POLL_SECONDS = 0.2
"""Between looks for the results of other ranks."""

Work = Callable[[object, Path], dict]
"""From what a task works on, and an empty folder for its files, to its facts (JSON values). A function of a module."""


@contextmanager
def worker_pool(workers: int | None = None) -> Iterator[Executor | None]:
    """Processes for ``run_tasks``; None: as many as this process has cores. With one the work is done in this process.

    The workers end with this process, however it ends; on an error what has not begun is not begun.
    """
    count = workers or len(os.sched_getaffinity(0))
    if count == 1:
        yield None
        return
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=die_with_parent)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run_tasks(folder: Path, tasks: Mapping[str, object], work: Work, pool: Executor | None = None, *, label: str,
              intact: Callable[[dict], bool] = lambda facts: True) -> dict[str, dict]:
    """Each task's facts, in the order of ``tasks``; ``folder / NAME`` holds the files of the task NAME.

    ``tasks``: name (of a file) -> what it works on, JSON values. A result made for another input is made again, and so is one
    that is not ``intact``: told by its facts, whether what the task left outside its folder is still there, whole.
    Raises what ``work`` raised, of the first task in order that failed; results that were finished stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank, ranks = place().rank, place().world_size
    prints = {name: _fingerprint(given) for name, given in tasks.items()}
    mine = list(tasks)[rank::ranks]
    _sweep(folder, set(mine))
    todo = [name for name in mine if (facts := _finished(folder, name, prints[name])) is None or not intact(facts)]
    done_before = len(mine) - len(todo)
    with tqdm(total=len(mine), initial=done_before, desc=label, unit="task", disable=None, leave=False) as progress:
        if pool is None:
            for name in todo:
                _do(folder, name, prints[name], tasks[name], work)
                progress.update()
        else:
            _do_in_pool(folder, {name: (prints[name], tasks[name]) for name in todo}, work, pool, progress)
    return {name: _await(folder, name, prints[name], intact) for name in tasks}


def _sweep(folder: Path, names: set[str]) -> None:
    """Removes what killed processes began of these tasks."""
    for entry in list(folder.iterdir()):
        if entry.name.startswith(".") and entry.suffix == ".tmp" and entry.name[1:].rsplit(".", 2)[0] in names:
            shutil.rmtree(entry)


def _do_in_pool(folder: Path, todo: dict[str, tuple[str, object]], work: Work, pool: Executor, progress: tqdm) -> None:
    try:
        futures = {pool.submit(_do, folder, name, *given, work): name for name, given in todo.items()}
        for future in as_completed(futures):
            future.result()
            progress.update()
    except BrokenProcessPool as error:
        raise PlatformError(
            f"a worker on {folder}", "it died without a word (killed, or out of memory?)", "workers that live",
            "run the same command again, it goes on; with fewer workers or smaller tasks if memory is short",
        ) from error
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _do(folder: Path, name: str, fingerprint: str, given: object, work: Work) -> None:
    """Does one task and publishes its folder."""
    result, draft = folder / name, folder / f".{name}.{os.getpid()}.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        facts = work(given, draft)
        for file in draft.iterdir():
            sync(file)
        write_json(draft / FACTS, {"input": fingerprint, "facts": facts})
        if result.exists():    # made for another input
            shutil.rmtree(result)
        draft.replace(result)
        sync(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _fingerprint(given: object) -> str:
    return hashlib.blake2b(json.dumps(given, sort_keys=True).encode(), digest_size=8).hexdigest()


def _finished(folder: Path, name: str, fingerprint: str) -> dict | None:
    """The facts of a task whose result is there and was made for this input."""
    path = folder / name / FACTS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        todo = f"delete {path.parent}; the next run makes it again"
        raise DataError(str(path), f"not readable: {error}", "the facts of a finished task", todo) from error
    return found["facts"] if found["input"] == fingerprint else None


def _await(folder: Path, name: str, fingerprint: str, intact: Callable[[dict], bool]) -> dict:
    """As ``_finished``, when another rank has made it. A rank that fails ends all, so this waits as long as the folder is there."""
    while (facts := _finished(folder, name, fingerprint)) is None or not intact(facts):
        if not folder.is_dir():
            raise PlatformError(str(folder), "removed while its tasks were waited for", "the folder of a stage at work", "run the stage again")
        time.sleep(POLL_SECONDS)
    return facts
