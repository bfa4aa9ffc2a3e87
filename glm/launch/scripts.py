"""The shell scripts around `glm run`: a Slurm job, its submission stage by stage, and a loop for machines without Slurm.

A job runs one stage by `glm run`, which starts the ranks, starts them again when some die (launcher.max_restarts), and ends with
REQUEUE_CODE when it was asked to stop and everything is saved. The script around it passes signals on and decides what that means:

    SIGUSR1 (Slurm, some time before the end of the job)   save, and queue the job again
    SIGTERM (scancel --batch --signal=TERM)                save, and end: who cancels wants no new start

A plain scancel and a preemption also kill the ranks after Slurm's KillWait or GraceTime; then the newest checkpoint counts.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from glm.errors import REQUEUE_CODE
from glm.launch.cluster import command_line, head_line, on_cluster
from glm.recipe.compose import Run
from glm.recipe.schema import ChatRecipe, RLRecipe, StageRecipe

FOLDER = "launch"
JOB, SUBMIT, REQUEUE = "job.sbatch", "submit.sh", "requeue.sh"
MARGIN_SECONDS = 60
"""Between the end of what ranks get to save (launcher.grace_seconds) and the end of a job's time."""

# `wait` ends early when a trapped signal arrives, with a code that is not the child's: then it is asked again. Asked for a child whose
# code was already told, it says 127.
_RUN_AND_FORWARD = """\
child='' signals=0 first=''
# shellcheck disable=SC2329  # the traps call it
pass_on() {
  signals=$((signals + 1)) first=${first:-$1}
  echo "$0: $1: asking the stage to save" >&2
  [ -z "$child" ] || kill -s "$1" "$child" 2>/dev/null || true
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
run() {    # runs its words, passes signals on, leaves their exit code in $code
  if [ -n "$first" ]; then return; fi    # asked to stop before anything started
  "$@" &
  child=$!
  [ -z "$first" ] || kill -s "$first" "$child"    # it came while the child was started
  local told=-1 now
  while [ "$told" -ne "$signals" ]; do
    told=$signals
    wait "$child"
    now=$?
    [ "$now" -eq 127 ] || code=$now
  done
  child=''
  if [ -n "$first" ] && [ "$code" -eq $((128 + $(kill -l "$first"))) ]; then code=@CODE@; fi    # it was told before it could listen
}
""".replace("@CODE@", str(REQUEUE_CODE))


def ranks_by_hand(run: Run, stages: Sequence[str]) -> str:
    """The command that starts the ranks of each stage, one line each; `glm run` has written their recipe.json."""
    lines = [command_line(run.stages[stage], Path(run.run_folder) / "stages" / stage / "recipe.json") for stage in stages]
    return "\n".join([head_line()] * any(on_cluster(run.stages[stage]) for stage in stages) + lines) + "\n"


def scripts(run: Run, stages: Sequence[str], changes: Sequence[str]) -> dict[str, str]:
    """File name in RUN/launch -> text. ``changes``: the KEY=VALUE words of the command line."""
    command = shlex.join([sys.executable, "-m", "glm.cli", "run", str(run.path.absolute()), *changes])
    return {JOB: job_script(run, stages, command), SUBMIT: submit_script(run, stages), REQUEUE: requeue_script(run, stages, command)}


def job_script(run: Run, stages: Sequence[str], command: str) -> str:
    """A Slurm job for one stage, named on its command line; the header asks for the largest of ``stages``."""
    largest = max((run.stages[stage] for stage in stages), key=lambda recipe: recipe.world_size)
    folder = Path(run.run_folder) / FOLDER
    warning = max(run.stages[stage].launcher.grace_seconds for stage in stages) + MARGIN_SECONDS
    options = [
        f"job-name={shlex.quote(run.name)}", *_resources(largest), "exclusive", "requeue", "open-mode=append",
        f"signal=B:USR1@{warning}", f"output={shlex.quote(f'{folder}/%x.%j.log')}",
    ]
    return f"""#!/usr/bin/env bash
# One stage of {run.name} as a Slurm job: sbatch {shlex.quote(str(folder / JOB))} STAGE. {SUBMIT} beside it submits all.
# Partition, account and time are the cluster's: sbatch --partition=… --time=… {JOB} STAGE
{"".join(f"#SBATCH --{option}" + chr(10) for option in options)}
# {warning} s before its time is over Slurm sends SIGUSR1: the stage saves and ends with code {REQUEUE_CODE}, and the job is queued again under its
# number. Lost nodes queue it again too (--requeue). Array tasks of one run wait for nothing: --array=1-9%1 makes nine jobs in a row, of
# which those that find the stage done end at once.
set -u
cd {shlex.quote(str(Path.cwd()))} || exit 1
code={REQUEUE_CODE}
{_RUN_AND_FORWARD}
run {command} "$@"
if [ "$code" -eq {REQUEUE_CODE} ] && [ "$first" != TERM ]; then
  job=$SLURM_JOB_ID
  [ -z "${{SLURM_ARRAY_TASK_ID:-}}" ] || job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
  echo "$0: saved; job $job is queued again" >&2
  scontrol requeue "$job"
fi
exit "$code"
"""


def submit_script(run: Run, stages: Sequence[str]) -> str:
    """One job a stage, each after the one before it ended well."""
    largest = max((run.stages[stage] for stage in stages), key=lambda recipe: recipe.world_size)
    lines = []
    for stage in stages:
        own, header = _resources(run.stages[stage]), _resources(largest)
        options = [f"--{option}" for option in own if option not in header] + [f"--job-name={run.name}-{stage}"]
        lines.append(f"submit {shlex.join(options)} {JOB} {shlex.quote(stage)}")
    return f"""#!/usr/bin/env bash
# Submits the stages of {run.name}, each to start when the one before it is done. Words are passed to sbatch: {SUBMIT} --partition=gpu
set -euo pipefail
cd {shlex.quote(str(Path(run.run_folder) / FOLDER))}
before=()
words=("$@")
submit() {{
  job=$(sbatch --parsable ${{before[@]+"${{before[@]}}"}} ${{words[@]+"${{words[@]}}"}} "$@")
  job=${{job%%;*}}    # a federation adds ;CLUSTER
  echo "job $job: ${{*: -1}}"
  before=(--dependency="afterok:$job" --kill-on-invalid-dep=yes)
}}
{chr(10).join(lines)}
"""


def requeue_script(run: Run, stages: Sequence[str], command: str) -> str:
    """Runs the stages here, and again after every end with REQUEUE_CODE that nobody wanted for good."""
    chosen = "" if list(stages) == list(run.stages) else " " + shlex.join(stages)
    return f"""#!/usr/bin/env bash
# Runs {run.name} on this machine until it is done. SIGUSR1: save and start again. SIGTERM: save and end with code {REQUEUE_CODE}; what starts
# this script again (systemd, cron, another scheduler) makes it go on.
set -u
cd {shlex.quote(str(Path.cwd()))} || exit 1
{_RUN_AND_FORWARD}
code={REQUEUE_CODE}
while [ "$code" -eq {REQUEUE_CODE} ] && [ "$first" != TERM ]; do
  first=''
  run {command}{chosen} "$@"
done
exit "$code"
"""


def _resources(recipe: StageRecipe) -> list[str]:
    """What a stage asks of Slurm. Engines of stages that run on one machine need its devices."""
    launcher = recipe.launcher
    nodes = launcher.nodes if on_cluster(recipe) else 1
    devices = launcher.ranks_per_node
    if isinstance(recipe, (ChatRecipe, RLRecipe)) and not on_cluster(recipe):
        devices = max(devices, recipe.engine.tp)
    threads = launcher.ranks_per_node * launcher.threads_per_rank
    asked = [f"nodes={nodes}", "ntasks-per-node=1", f"cpus-per-task={threads}"]
    return asked if recipe.platform == "host" else [*asked, f"gpus-per-node={devices}"]
