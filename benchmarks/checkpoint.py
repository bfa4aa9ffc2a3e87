"""What checkpoints cost on this machine: the stall of a step, GB/s beside torch.save and torch.load, and another layout's load.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py [--folder FOLDER] [--repeats 3]

A model of 29 million parameters with its optimizer's state on one rank; then the same on two, tensor parallel, loaded again as it
was saved and as two pipeline stages. ``torch.save`` writes the same tensors into one file and flushes it to the disk; ours
writes, flushes, digests and publishes. ``torch.load`` reads that file; ours compares every digest first. Files are in the page
cache. The best of the repeats counts, sides in turns. Prints Markdown; docs/benchmarks.md holds the output of a day.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from glm.checkpoint.run_folder import write_json
from glm.recipe.compose import dump_recipe, load_recipe, load_run

TINY = Path(__file__).parents[1] / "configs" / "glm45" / "tiny.yaml"
STAGE = "pretrain_general"
SHAPE = ("num_layers=8", "hidden_size=256", "dense_ffn_size=1024", "expert_ffn_size=128", "num_experts=32", "num_attention_heads=8",
         "experts_per_token=4", "vocab_size=8192")


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--folder", type=Path, help="where to work; 2 GB are needed (default: a temporary folder)")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--rank", nargs=3, metavar=("WHAT", "RECIPE", "CHECKPOINTS"), help=argparse.SUPPRESS)
    given = made.parse_args()
    if given.rank:
        return rank(*given.rank, given.repeats)
    root = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        one = measured(root, "one", given.repeats, "all")
        saved = measured(root, "two", given.repeats, "save", "layout.tp=2")
        plain = measured(root, "two", given.repeats, "load", "layout.tp=2")
        other = measured(root, "two", given.repeats, "load", "layout.pp=2")
    finally:
        shutil.rmtree(root)
    size = one["bytes"] / 1e9
    print(f"{size:.2f} GB of tensors; {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, torch {version('torch')}, "
          f"megatron-core {version('megatron-core')}\n")
    print("| one rank | seconds | GB/s | of torch's |\n| --- | ---: | ---: | ---: |")
    for name, peer in (("torch.save, flushed", None), ("save", "torch.save, flushed"), ("torch.load", None), ("load, verified", "torch.load"),
                       ("load, not verified", "torch.load")):
        print(f"| {name} | {one[name]:.2f} | {size / one[name]:.2f} | {f'{one[peer] / one[name]:.2f}' if peer else ''} |")
    print("\n| a save stalls training for | seconds |\n| --- | ---: |")
    for name in ("synchronous", "asynchronous"):
        print(f"| {name} | {one[name]:.3f} |")
    print("\n| two ranks | seconds | of the plain load |\n| --- | ---: | ---: |")
    print(f"| save, tp 2 | {saved['save']:.2f} | |\n| load, tp 2 | {plain['load, verified']:.2f} | |")
    print(f"| load, pp 2 | {other['load, verified']:.2f} | {other['load, verified'] / plain['load, verified']:.2f} |")


def measured(root: Path, name: str, repeats: int, what: str, *layout: str) -> dict[str, float]:
    """Seconds by name, as rank 0 found them."""
    ranks = 2 if layout else 1
    recipe = load_run(TINY, [
        *(f"model.{value}" for value in SHAPE), f"{STAGE}.layout.ep=1", f"{STAGE}.launcher.ranks_per_node={ranks}",
        "tokenizer.tokenizer.vocab_size=8192", *(f"{STAGE}.{value}" for value in layout),
    ]).stages[STAGE]
    path = root / "recipe.json"
    write_json(path, dump_recipe(recipe))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-W", "ignore", __file__, "--repeats", str(repeats), "--rank", what, str(path), str(root / name)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }) for rank in range(ranks)]
    told = [process.communicate()[0] for process in started]
    assert all(process.returncode == 0 for process in started), told
    return json.loads(told[0].splitlines()[-1])


def rank(what: str, recipe_path: str, folder: str, repeats: int) -> None:
    from glm import platform as platforms

    recipe = load_recipe(recipe_path)
    platforms.activate(recipe.platform)
    import torch
    import torch.distributed as dist

    from glm import runtime as runtimes
    from glm.checkpoint import store
    from glm.checkpoint.state import sharded_state, stored_bytes
    from glm.checkpoint.writer import CheckpointWriter
    from glm.train.step import Trainer

    runtime = runtimes.start(recipe)
    trainer = Trainer(recipe)
    state = sharded_state(trainer.chunks, trainer.optimizer)
    found: dict[str, list[float]] = {}

    def timed(name: str, function):
        dist.barrier()
        started = time.perf_counter()
        result = function()
        dist.barrier()
        found.setdefault(name, []).append(time.perf_counter() - started)
        return result

    writer, step = CheckpointWriter(Path(folder), runtime, keep=1), 0

    def begin() -> None:
        info = store.CheckpointInfo(STAGE, step, 0, 0, recipe.rotary_base)
        writer.begin(info, recipe.model, trainer.chunks, trainer.optimizer)

    plain = Path(folder).with_suffix(".pt")
    for _ in range(repeats):
        step += 1
        if what == "all":
            tensors = {f"{part}.{key}": value.data for part, values in state.items() for key, value in values.items() if hasattr(value, "data")}

            def peer() -> None:
                with plain.open("wb") as file:
                    torch.save(tensors, file)
                    file.flush()
                    os.fsync(file.fileno())

            timed("torch.save, flushed", peer)
            timed("torch.load", lambda: torch.load(plain, weights_only=True))
        if what != "load":
            started = time.perf_counter()
            timed("save", lambda: (begin(), writer.finish()))
            found.setdefault("synchronous", []).append(time.perf_counter() - started)
            step += 1
            begin()
            written = None
            while written is None:    # what training would do, without the noise of its steps
                time.sleep(0.05)
                written = writer.poll()
            found.setdefault("asynchronous", []).append(written.stall_seconds)
        if what != "save":
            newest = store.newest_checkpoint(Path(folder))
            timed("load, verified", lambda: store.load(newest, trainer.chunks, trainer.optimizer))
            timed("load, not verified", lambda: store.load(newest, trainer.chunks, trainer.optimizer, verified=True))
    size = stored_bytes(state)
    runtimes.stop()
    if runtime.is_first:
        print(json.dumps({name: min(seconds) for name, seconds in found.items()} | {"bytes": size}))


if __name__ == "__main__":
    main()
