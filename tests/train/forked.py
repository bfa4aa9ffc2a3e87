"""Training stages in forks of a process that has imported everything and begun nothing: a start costs a second, so a test can have many."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import psutil

from glm.checkpoint.manifest import newest_checkpoint, read_manifest, step_folder
from glm.checkpoint.run_folder import RunFolder, write_json
from glm.recipe.compose import dump_recipe, load_run
from tests.runs import TINY

STAGE = "pretrain_general"
SMALL = (
    "tokenizer.tokenizer.vocab_size=512", "tokenizer.tokenizer.sample_bytes=200_000", "model.vocab_size=512", "model.num_layers=2",
    "model.hidden_size=64", "model.dense_ffn_size=128", "model.expert_ffn_size=32",
    *(f"{stage}.{key}" for stage in (STAGE, "pretrain_code_reasoning") for key in (
        "tokens=3584", "batch.tokens.start=256", "batch.tokens.end=512", "batch.tokens.over=1024", "batch.micro_batch_size=4",
        "schedule.warmup=512", "schedule.decay_until=6144", "checkpoint.every_steps=2",
        "launcher.ranks_per_node=1", "layout.ep=1", "data.mixture=plain_text",
    )),
    *(f"{stage}.batch.tokens=2048" for stage in ("midtrain_repo_code", "midtrain_reasoning")),    # their ramp is not over so early
)
"""A stage of eight steps, the first four in the batch ramp, a model of 0.2 million parameters, a checkpoint every other step."""


FORKS = multiprocessing.get_context("forkserver")
"""Not of the test process itself: earlier tests may have left it process groups, whose threads no fork has."""
FORKS.set_forkserver_preload(["tests.train.imported"])


def _rank(rank: int, world_size: int, port: int, recipe: Path, output: Path, most_bytes: int | None) -> None:
    """Becomes the rank of a stage, and ends with its exit status."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    from glm.rank import run

    code = 70
    try:
        code = run(recipe)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class Ranks:
    """One start of a stage: its ranks, forked. ``with``: none is left."""

    def __init__(self, folder: Path, *overrides: str, stage: str = STAGE, most_bytes: int | None = None):
        """``most_bytes``: no file may become larger; the kernel refuses the write, as a full disk does."""
        chosen = {given.split("=")[0]: given for given in (*SMALL, f"run_folder={folder}", *overrides)}
        recipe = load_run(TINY, list(chosen.values())).stages[stage]
        self.folder, self.recipe, self.output = folder, recipe, folder.parent / f"{folder.name}.{stage}.log"
        path = RunFolder(folder).recipe(stage)
        write_json(path, dump_recipe(recipe))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.output.write_bytes(b"")
        world_size = recipe.world_size
        self._processes = [
            FORKS.Process(target=_rank, args=(rank, world_size, port, path, self.output, most_bytes)) for rank in range(world_size)
        ]
        for process in self._processes:
            process.start()
        self.running = [process.pid for process in self._processes]
        self.status: dict[int, int] = {}

    def poll(self) -> bool:
        """Whether all ranks have ended."""
        self.status = {process.pid: process.exitcode for process in self._processes if process.exitcode is not None}
        return len(self.status) == len(self.running)

    def wait(self, seconds: float = 240) -> int:
        """The worst exit status, when all ranks have ended."""
        deadline = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(self.said)
            if any(self.status.values()):  # what the launcher does when a rank fails
                time.sleep(0.5)
                self.kill()
            time.sleep(0.01)
        return max(map(abs, self.status.values()))

    def writers(self) -> list[psutil.Process]:
        """The processes that write checkpoints for the ranks."""
        return [child for rank in self.running if rank not in self.status for child in psutil.Process(rank).children()]

    def until(self, condition, seconds: float = 120) -> None:
        """Lets the ranks run until the condition holds; they must not end before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert not self.poll() or condition(), f"ended too early\n{self.said}"
            assert time.monotonic() < deadline, self.said
            time.sleep(0.002)

    def kill(self) -> None:
        for process in [process for process in self.running if process not in self.status]:
            os.kill(process, signal.SIGKILL)
        while not self.poll():
            time.sleep(0.005)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_) -> None:
        self.kill()

    @property
    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")


def completed(folder: Path, *overrides: str, stage: str = STAGE) -> str:
    """Runs the stage to its end; what its ranks said."""
    with Ranks(folder, *overrides, stage=stage) as ranks:
        assert ranks.wait() == 0, ranks.said
        return ranks.said


def refused(folder: Path, *overrides: str, stage: str = STAGE) -> str:
    """Starts a stage that must end with one message of four parts, which is returned."""
    with Ranks(folder, *overrides, stage=stage) as ranks:
        code, said = ranks.wait(), ranks.said
    assert code == 2 and "Traceback" not in said, said
    for part in ("found:", "expected:", "to do:"):
        assert part in said, said
    return said


def checkpoints(folder: Path, stage: str = STAGE) -> Path:
    return RunFolder(folder).checkpoints(stage)


def start_of(run: Path, name: str) -> Path:
    """A new run with the tokenizer and the tokenized data of ``run``, and nothing else."""
    new = run.parent / name
    for part in ("tokenizer", "data"):
        shutil.copytree(run / part, new / part)
    return new


def part_of(run: Path, name: str, steps: tuple[int, ...], stage: str = STAGE) -> Path:
    """A copy of a finished run that stands at the newest of ``steps``, of which it has the checkpoints, without metrics."""
    new = start_of(run, name)
    for step in steps:
        shutil.copytree(checkpoints(run, stage) / step_folder(step), checkpoints(new, stage) / step_folder(step))
    return new


def numbers(folder: Path, stage: str = STAGE) -> dict[int, tuple]:
    """{step: what training logged of it that is a function of the data}."""
    names = ("train/loss", "train/mtp_loss", "train/grad_norm", "balance/bias_max", "balance/max_over_mean", "train/run_tokens")
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]    # the last one may be half written
    return {line["step"]: tuple(map(str, (line[name] for name in names))) for line in records if line["stage"] == stage and names[0] in line}


def state_digests(folder: Path, stage: str = STAGE) -> dict[str, str]:
    """{tensor or object: sha256} of everything the newest checkpoint holds: weights, optimizer and generator."""
    files = read_manifest(newest_checkpoint(checkpoints(folder, stage)))["files"]
    items = {label: part["sha256"] for entry in files.values() for label, part in entry.get("items", {}).items()}
    return items | {"common.pt": files["common.pt"]["sha256"]}
