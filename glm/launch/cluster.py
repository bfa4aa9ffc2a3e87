"""The same stages on more than one machine: torchrun under srun. Imports no torch."""

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

from glm.checkpoint.run_folder import RunFolder
from glm.errors import PlatformError
from glm.launch.local import POLL_SECONDS, Interrupted, RankFailed
from glm.launch.signals import Requeued, StopSignals
from glm.recipe.schema import StageRecipe

RENDEZVOUS_PORT = 29_500


def command_line(recipe: StageRecipe, recipe_file: Path) -> str:
    """The command that starts a stage's ranks by hand, for a shell."""
    launcher = recipe.launcher
    torchrun = ["torchrun", f"--nnodes={launcher.nodes}", f"--nproc-per-node={launcher.ranks_per_node}"]
    prefix = f"OMP_NUM_THREADS={launcher.threads_per_rank} "
    if not on_cluster(recipe):
        return prefix + shlex.join([*torchrun, "-m", "glm.rank", str(recipe_file)])
    # HEAD is a variable of the shell: the first node of the allocation, known only there.
    rendezvous = f'--rdzv-backend=c10d --rdzv-id={shlex.quote(recipe.stage)} --rdzv-endpoint="$HEAD:{RENDEZVOUS_PORT}"'
    threads = f"--cpus-per-task={launcher.ranks_per_node * launcher.threads_per_rank}"    # srun does not take it from the job
    srun = ["srun", f"--nodes={launcher.nodes}", "--ntasks-per-node=1", threads, "--kill-on-bad-exit=1", *torchrun]
    return f"{prefix}{shlex.join(srun)} {rendezvous} {shlex.join(['-m', 'glm.rank', str(recipe_file)])}"


def head_line() -> str:
    """Sets HEAD, for the lines of command_line."""
    return 'HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'


def on_cluster(recipe: StageRecipe) -> bool:
    """Whether the stage is started by srun; a stage of one rank runs where `glm run` does."""
    return recipe.launcher.kind == "slurm" and recipe.world_size > 1


def run_on_cluster(recipe: StageRecipe, recipe_file: Path, stop: StopSignals) -> None:
    """Runs a stage inside the Slurm allocation this process belongs to. Raises PlatformError outside one, RankFailed if it fails.

    srun and torchrun keep neither signals nor exit codes: the stage is asked to stop by a file, and says by one that it did,
    by another how its first rank ended.
    """
    require_allocation(recipe)
    folder = RunFolder.of(recipe)
    process = subprocess.Popen(["bash", "-euc", f"{head_line()}\n{command_line(recipe, recipe_file)}"], process_group=0)
    deadline = None
    try:
        while (code := process.poll()) is None and (deadline is None or time.monotonic() < deadline):
            if stop.asked and deadline is None:
                folder.stop_request(recipe.stage).touch()
                deadline = time.monotonic() + recipe.launcher.grace_seconds
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
        raise Interrupted(recipe.stage) from None
    if code is None:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    saved = folder.requeue(recipe.stage).exists()
    if saved or stop.asked and code != 0:
        raise Requeued(recipe.stage, saved)
    if code:
        raise _failure(recipe, folder, code)


def _failure(recipe: StageRecipe, folder: RunFolder, srun_code: int) -> RankFailed:
    """By what the first rank to fail has left. None of them lived to: one was killed, and torchrun stopped the others."""
    try:
        left = json.loads(folder.exit(recipe.stage).read_text(encoding="utf-8"))
        first, code = f"rank {left['rank']} exited first, with code {left['code']}", left["code"]
    except (FileNotFoundError, json.JSONDecodeError):
        first, code = "no rank could say why", -signal.SIGKILL
    failure = RankFailed(
        f"stage {recipe.stage}", f"srun ended with code {srun_code}; {first}", "every rank to end with code 0",
        "its last words are above; the same command continues from the newest checkpoint",
    )
    failure.code = code
    return failure


def require_allocation(recipe: StageRecipe) -> None:
    """Raises PlatformError outside a Slurm allocation."""
    launcher = recipe.launcher
    if "SLURM_JOB_NODELIST" not in os.environ:
        raise PlatformError(
            f"stage {recipe.stage}, launcher.kind slurm", "no Slurm allocation (SLURM_JOB_NODELIST is not set)",
            f"{launcher.nodes} nodes with {launcher.ranks_per_node} devices each",
            f"sbatch --nodes={launcher.nodes} --gpus-per-node={launcher.ranks_per_node} --wrap 'glm run …', or see `glm run … --dry-run`",
        )
