"""Real `glm run` processes on the tiny recipe, for tests."""

import json
import subprocess
import sys
from pathlib import Path

TINY = Path(__file__).parents[1] / "configs" / "glm45" / "tiny.yaml"
SMALL_TOKENIZER = "tokenizer.tokenizer.sample_bytes=1M"
UNPREPARED = "pretrain_general.data.mixture=plain_text"
"""Lets pretrain_general run without prepare_pretrain before it."""


def glm(*words: object, timeout: float = 300, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """`glm WORDS` to its end, output captured."""
    return subprocess.run(command(*words, prefix=prefix), capture_output=True, text=True, timeout=timeout)


def command(*words: object, prefix: tuple[str, ...] = ()) -> list[str]:
    return [*prefix, sys.executable, "-m", "glm.cli", *map(str, words)]


def started(run_folder: Path, *words: object) -> subprocess.Popen:
    """`glm run` in the background; its output goes to a file beside the run."""
    log = (run_folder.parent / f"{run_folder.name}.log").open("wb")
    return subprocess.Popen(command("run", TINY, *words, f"run_folder={run_folder}"), stdout=log, stderr=log)


def metrics(run_folder: Path, stage: str, name: str) -> dict[int, float]:
    """{step: value} of one metric."""
    path = run_folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["step"]: line[name] for line in lines if line["stage"] == stage and name in line}


def processes_of(run_folder: Path) -> list[str]:
    """Command lines of running processes that name the run folder."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(run_folder) in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(line)
    return found
