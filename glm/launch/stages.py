"""``glm run``: the stages of a run in order, each once. Imports no torch."""

import fcntl
import json
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

from glm.checkpoint.run_folder import RunFolder, write_json
from glm.errors import PlatformError, RecipeError
from glm.launch.cluster import on_cluster, run_on_cluster
from glm.launch.local import rank_command, run_ranks
from glm.launch.preflight import preflight
from glm.launch.signals import Requeued, StopSignals
from glm.launch.supervisor import supervise
from glm.recipe.compose import Run
from glm.recipe.saved import differing_keys, dump_recipe, load_recipe
from glm.recipe.schema import StageRecipe
from glm.recipe.source import nearest, shown


def run_stages(
    run: Run, chosen: list[str], say: Callable[[str], None] = print, command: Callable[[Path], list[str]] = rank_command
) -> None:
    """Runs what is not yet done of ``chosen`` (none: all stages), in the order of the run file.

    ``command``: from the recipe file of a stage to what each of its ranks executes on this machine.

    Everything that can be refused is refused before the first stage starts: an unknown stage, one made with another
    recipe, a parent that is not there, a folder another `glm run` is using, and what `preflight` finds for any of them.
    A stage whose ranks died is started again (glm/launch/supervisor.py). Raises RecipeError, PlatformError, and Requeued when
    the scheduler asked to stop.
    """
    selected = select(run, chosen)
    folder, prints = RunFolder(run.run_folder), run.fingerprints()
    with lock(folder.root), StopSignals() as stop:
        done = {stage for stage in run.stages if _is_done(folder, stage, prints[stage])}
        for stage in selected:
            if stage not in done:
                refuse_other_recipe(run, folder, stage, prints[stage])
        _require_parents(run, selected, done)
        preflight([run.stages[stage] for stage in selected if stage not in done])
        for stage in selected:
            if stage in done:
                say(f"{stage}: done before, skipped")
                continue
            say(f"{stage}: starts ({run.stages[stage].world_size} rank{'s' * (run.stages[stage].world_size > 1)})")
            started = time.monotonic()
            _run_stage(run.stages[stage], folder, prints[stage], command, say, stop)
            seconds = time.monotonic() - started
            write_json(folder.done(stage), {"fingerprint": prints[stage], "seconds": round(seconds, 1)})
            say(f"{stage}: done in {seconds:.0f} s")
            if stop.asked:
                raise Requeued(stage, saved=True)


def select(run: Run, chosen: list[str]) -> list[str]:
    """``chosen`` in the order of the run file; all stages if empty."""
    for stage in chosen:
        if stage not in run.stages:
            raise RecipeError(shown(run.path), f"stage {stage!r}", "a stage of this run file", nearest(stage, run.stages))
    return [stage for stage in run.stages if not chosen or stage in chosen]


def _run_stage(recipe: StageRecipe, folder: RunFolder, fingerprint: str, command: Callable[[Path], list[str]],
               say: Callable[[str], None], stop: StopSignals) -> None:
    stage = recipe.stage
    write_json(folder.recipe(stage), dump_recipe(recipe))
    write_json(started_file(folder, stage), {"fingerprint": fingerprint})
    for left in (folder.stop_request(stage), folder.requeue(stage)):
        left.unlink(missing_ok=True)

    def start(attempt: int) -> None:
        if stop.asked:
            raise Requeued(stage, saved=folder.requeue(stage).exists())
        folder.exit(stage).unlink(missing_ok=True)
        if on_cluster(recipe):
            run_on_cluster(recipe, folder.recipe(stage), stop)
        else:
            run_ranks(
                command(folder.recipe(stage)), recipe.world_size, folder.stage(stage), stage=stage, attempt=attempt, stop=stop,
                threads_per_rank=recipe.launcher.threads_per_rank, grace_seconds=recipe.launcher.grace_seconds,
            )

    supervise(start, recipe, folder, say, stop.sleep)


def started_file(folder: RunFolder, stage: str) -> Path:
    """Holds the fingerprint of a stage that has begun, its parents' included."""
    return folder.stage(stage) / "started.json"


def _is_done(folder: RunFolder, stage: str, fingerprint: str) -> bool:
    return _fingerprint_in(folder.done(stage)) == fingerprint


def _fingerprint_in(path: Path) -> str | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise RecipeError(
            shown(path), "a file that is not whole", "what `glm run` writes", f"rm -r {shown(path.parent)}, then run again: it starts anew"
        ) from None


def refuse_other_recipe(run: Run, folder: RunFolder, stage: str, fingerprint: str) -> None:
    """Raises RecipeError if the stage was begun or finished with another recipe, or on other parents."""
    made_with = _fingerprint_in(folder.done(stage)) or _fingerprint_in(started_file(folder, stage))
    if made_with is None or made_with == fingerprint:
        return
    changes = differing_keys(load_recipe(folder.recipe(stage)), run.stages[stage])
    listed = "\n            ".join(changes) or f"nothing of its own, but of {' or '.join(run.needs(stage))}, which it builds on"
    raise RecipeError(
        shown(folder.stage(stage)), f"stage {stage} was made with another recipe; what changed:\n            {listed}",
        "the recipe it was made with",
        f"give the new run a folder of its own: run_folder=PATH\n            or make the stage anew: rm -r {shown(folder.stage(stage))}",
    )


def _require_parents(run: Run, selected: list[str], done: set[str]) -> None:
    for stage in selected:
        missing = [name for name in run.needs(stage) if name not in done and name not in selected]
        if missing and stage not in done:
            raise RecipeError(
                f"stage {stage}", f"{missing[0]} is not done", "the stages it builds on to be done",
                f"glm run {shown(run.path)} {' '.join(missing)} {stage}",
            )


@contextmanager
def lock(root: Path):
    """One `glm run` a folder. The kernel drops the lock with the process, so a crash leaves none behind."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise PlatformError(shown(root), "a file", "a folder, or nothing yet", "name another one: run_folder=PATH") from None
    with (root / ".lock").open("a+", encoding="utf-8") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.seek(0)
            owner = held.read().strip() or "unknown"
            raise PlatformError(
                shown(root), f"in use by another `glm run` (process {owner})", "one at a time", "wait for it, stop it, or use run_folder=PATH"
            ) from None
        held.truncate(0)
        held.write(str(os.getpid()))
        held.flush()
        yield
