"""What the tiny run costs on this machine: seconds a stage, tokens per second, rollouts with and without MTP, memory.

    python benchmarks/tiny.py [RUNFOLDER]

Without a folder a whole run is made first, in runs/benchmark, while the memory of all its processes is sampled. Prints
Markdown; docs/benchmarks.md holds the output of a day.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import psutil

from glm.checkpoint.run_folder import RunFolder
from glm.data.problems import TASKS, training_problems
from glm.inference.client import EngineClient, Sampling
from glm.inference.server import EngineServer, ServerSpec
from glm.inference.speculative import acceptance_length
from glm.metrics.read import read_lines
from glm.tokenizer import encode_dialogue, load_tokenizer, stop_token_ids

RUNFILE = Path(__file__).parents[1] / "configs" / "glm45" / "tiny.yaml"
CONCURRENCY = (1, 16, 128, 256)
DRAFT_STEPS = (0, 1, 3)
REPEATS = 3


class PeakMemory:
    """Largest proportional set size of a process and all its descendants, sampled twice a second."""

    def __init__(self, process: psutil.Process):
        self.process, self.peak_bytes = process, 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(0.5):
            total = 0
            for process in [self.process, *self.process.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.NoSuchProcess:
                    continue  # it ended between the listing and the reading
            self.peak_bytes = max(self.peak_bytes, total)


def whole_run(folder: Path) -> int:
    """Runs every stage; returns the peak memory in bytes."""
    process = subprocess.Popen([sys.executable, "-m", "glm.cli", "run", str(RUNFILE), f"run_folder={folder}"])
    with PeakMemory(psutil.Process(process.pid)) as memory:
        if process.wait() != 0:
            raise SystemExit("the run failed; see above")
    return memory.peak_bytes


def stage_table(folder: RunFolder) -> str:
    """Seconds from start to done of every stage, and the tokens per second of its steps."""
    lines = read_lines(folder.metrics).records
    rows = ["| stage | seconds | steps | tokens | median tokens/s of a step |", "| --- | ---: | ---: | ---: | ---: |"]
    total = 0.0
    for recipe in sorted(folder.root.glob("stages/*/recipe.json"), key=lambda path: path.stat().st_mtime):
        name = recipe.parent.name
        seconds = json.loads(folder.done(name).read_text())["seconds"]
        total += seconds
        steps = [line for line in lines if line["stage"] == name and "train/loss" in line]
        rollouts = [line for line in lines if line["stage"] == name and "rl/reward" in line]
        speeds = [line["train/tokens_per_second"] for line in steps]
        tokens = sum(line["train/tokens"] for line in steps)
        rows.append(
            f"| {name} | {seconds:.0f} | {len(steps) + len(rollouts) or ''} | {f'{tokens:,}' if tokens else ''} "
            f"| {f'{statistics.median(speeds):,.0f}' if speeds else ''} |"
        )
        if rollouts:
            rows.append(_rl_row(rollouts))
    return "\n".join([*rows, f"| all | {total:.0f} | | | |"])


def _rl_row(rollouts: list[dict]) -> str:
    median = {key: statistics.median(line[f"rl/{key}_seconds"] for line in rollouts) for key in ("rollout", "train", "sync")}
    speed = statistics.median(line["rl/rollout_tokens_per_second"] for line in rollouts)
    return (f"| … a step: rollout {median['rollout']:.2f} s ({speed:,.0f} tokens/s), update {median['train']:.2f} s, "
            f"proved push {median['sync']:.2f} s | | | | |")


async def _generate(server: EngineServer, prompts: list[list[int]], sampling: Sampling) -> tuple[float, float | None]:
    """(best tokens per second of REPEATS, acceptance length)."""
    async with EngineClient(server.url, server.spec.api_key) as client:
        await client.generate_batch(prompts[:8], sampling)
        speeds, replies = [], []
        for _ in range(REPEATS):
            started = time.perf_counter()
            replies = await client.generate_batch(prompts, sampling)
            speeds.append(sum(len(reply.token_ids) for reply in replies) / (time.perf_counter() - started))
        return max(speeds), acceptance_length(replies)


def rollout_table(folder: RunFolder) -> str:
    """One server, the run's own model and prompts: plain decoding against speculation with the MTP layer."""
    tokenizer = load_tokenizer(folder.tokenizer)
    problems = training_problems(TASKS, max(CONCURRENCY), 7)
    random.Random(0).shuffle(problems)
    prompts = [
        encode_dialogue(tokenizer, [{"role": "user", "content": one.question}], add_generation_prompt=True)[0] for one in problems
    ]
    sampling = Sampling(temperature=1.0, max_new_tokens=40, stop_token_ids=tuple(stop_token_ids(tokenizer)))
    rows = ["| draft tokens | " + " | ".join(f"{count} at once" for count in CONCURRENCY) + " | acceptance length |",
            "| ---: |" + " ---: |" * (len(CONCURRENCY) + 1)]
    with tempfile.TemporaryDirectory() as scratch:
        for steps in DRAFT_STEPS:
            spec = ServerSpec(folder.export, "host", num_draft_steps=steps, context_length=64, max_running_requests=256)
            with EngineServer(spec, Path(scratch) / f"engine_{steps}.log") as server:
                server.wait_ready()
                results = [asyncio.run(_generate(server, prompts[:count], sampling)) for count in CONCURRENCY]
            accepted = results[-1][1]
            rows.append(f"| {steps} | " + " | ".join(f"{speed:,.0f}" for speed, _ in results)
                        + f" | {'–' if accepted is None else f'{accepted:.2f}'} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", nargs="?", type=Path, help="a finished run; made in runs/benchmark when not given")
    given = parser.parse_args().run_folder
    root = given or Path("runs/benchmark")
    peak = whole_run(root) if given is None else None
    folder = RunFolder(root)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "sglang", "transformers"))
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {packages}\n")
    print(stage_table(folder))
    if peak is not None:
        print(f"\nPeak memory of all processes together: {peak / 2**30:.1f} GiB")
    print("\nTokens per second of one SGLang server (temperature 1, at most 40 new tokens, best of "
          f"{REPEATS}):\n\n{rollout_table(folder)}")


if __name__ == "__main__":
    main()
