"""What conversion costs on this machine, beside ``cp`` of the same bytes: seconds, GB/s and memory, both directions.

    python benchmarks/convert.py [--folder FOLDER] [--repeats 3]

Makes a folder of 3.5 GB with GLM-4.5-Air's tensor sizes (fewer layers and experts, a quarter of the vocabulary), converts it
there and back in processes of their own with the files in the page cache, and removes everything. Prints Markdown;
docs/benchmarks.md holds the output of a day.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from glm.checkpoint.run_folder import write_json
from glm.recipe.sections import Model
from glm.weights.hf_config import config_json
from glm.weights.hf_folder import file_names, usual_dtype, write_index
from glm.weights.hf_shapes import hf_shapes
from glm.weights.name_map import hf_names
from glm.weights.places import safetensors_header

SHAPE = Model(
    num_layers=3, num_dense_layers=1, hidden_size=4096, dense_ffn_size=10944, expert_ffn_size=1408, num_attention_heads=96,
    num_query_groups=8, head_dim=128, qk_norm=False, num_experts=16, experts_per_token=8, routed_scaling_factor=1.0,
    num_mtp_layers=1, vocab_size=37888, max_position=131072,
)
FILES = 4
BRIDGE_GB_PER_SECOND = 0.04
"""Megatron-Bridge's CPU import as published (its pull request 5316); 0.3.1 does not import without transformer-engine."""
_CHILD = """
import json, sys, time
from glm.convert.{name} import {name}

def memory(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))

open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew: what importing took does not count
baseline, start, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
{name}(sys.argv[1], sys.argv[2], digests=sys.argv[3] == "digests")
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({{"seconds": seconds, "cpu": cpu, "memory": memory("VmHWM") - baseline}}))
"""


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--folder", type=Path, help="where to work; 11 GB are needed (default: a temporary folder)")
    made.add_argument("--repeats", type=int, default=3, help="the best of so many runs counts (default: 3)")
    given = made.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        root = Path(folder)
        total = write_source(root / "hf")
        largest = max(size for size in _sizes().values())
        copies = []
        results: dict[str, list[dict]] = {}
        for _ in range(given.repeats):  # in turn, so that what else the machine does falls on all alike
            copies.append(copy(root / "hf", root / "copy"))
            for digests in ("digests", "no digests"):
                results.setdefault(f"from_hf, {digests}", []).append(convert("from_hf", root / "hf", root / "ck", digests))
                results.setdefault(f"to_hf, {digests}", []).append(convert("to_hf", root / "ck", root / "out", digests))
                compare(root / "hf", root / "out")
                for name in ("ck", "out"):
                    shutil.rmtree(root / name)
        best = {key: min(copied[key] for copied in copies) for key in copies[0]}
        report(total, largest, best, {
            name: {key: (max if key == "memory" else min)(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()
        })


def _sizes() -> dict[str, int]:
    shapes = hf_shapes(SHAPE)
    return {name: torch.Size(shapes[name]).numel() * usual_dtype(name, "bf16").itemsize for name in hf_names(SHAPE)}


def write_source(folder: Path) -> int:
    """A folder of random bfloat16 weights, without this suite's manifest, as a download is; returns its bytes of tensors."""
    folder.mkdir(parents=True)
    shapes, sizes = hf_shapes(SHAPE), _sizes()
    generator = torch.Generator().manual_seed(0)
    files, limit = {}, sum(sizes.values()) / FILES
    held: list[list[str]] = [[]]
    for name in sizes:
        if sum(sizes[other] for other in held[-1]) + sizes[name] > limit and len(held) < FILES:
            held.append([])
        held[-1].append(name)
    files = dict(zip(file_names(len(held)), held))
    for file, names in files.items():
        ordered = sorted(names, key=lambda name: -usual_dtype(name, "bf16").itemsize)
        with (folder / file).open("wb") as out:
            out.write(safetensors_header({name: (usual_dtype(name, "bf16"), shapes[name]) for name in ordered}))
            for name in ordered:
                values = torch.randn(shapes[name], generator=generator).mul_(0.02).to(usual_dtype(name, "bf16"))
                out.write(memoryview(values.flatten().view(torch.uint8).numpy()))
    write_index(folder, files, sum(sizes.values()))
    write_json(folder / "config.json", config_json(SHAPE, rotary_base=1_000_000, params="bf16"))
    return sum(sizes.values())


def copy(source: Path, target: Path) -> dict[str, float]:
    """Seconds of cp, those it computed, and those until the bytes are on the disk, to which the converters always bring theirs."""
    os.sync()
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    copied, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["sync", *map(str, target.iterdir())], check=True)
    synced = time.perf_counter()
    shutil.rmtree(target)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": copied - start, "cpu": cpu, "synced": synced - start}


def convert(name: str, source: Path, target: Path, digests: str) -> dict:
    os.sync()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CHILD.format(name=name), str(source), str(target), digests],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(source: Path, target: Path) -> None:
    """The way there and back changed no byte: every tensor, whatever file it is in."""
    from glm.weights.hf_reader import HFFolder

    before = HFFolder(source)
    after = HFFolder(target)
    assert sorted(before.names) == sorted(after.names)
    for name in before.names:
        assert before.place(name).digest() == after.place(name).digest(), name


def report(total: int, largest: int, copied: dict[str, float], results: dict[str, dict]) -> None:
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, "
          f"torch {version('torch')}; {total / 1e9:.2f} GB of tensors, the largest {largest / 1e6:.0f} MB\n")
    print("| | seconds | GB/s | of cp | of cp and sync | CPU seconds | × Megatron-Bridge | memory, largest tensors |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    print(f"| cp | {copied['seconds']:.2f} | {total / copied['seconds'] / 1e9:.2f} | | | {copied['cpu']:.2f} | | |")
    print(f"| cp, then sync | {copied['synced']:.2f} | {total / copied['synced'] / 1e9:.2f} | | | | | |")
    for name, run in results.items():
        seconds = run["seconds"]
        print(f"| {name} | {seconds:.2f} | {total / seconds / 1e9:.2f} | {copied['seconds'] / seconds:.2f} "
              f"| {copied['synced'] / seconds:.2f} | {run['cpu']:.2f} | {total / seconds / 1e9 / BRIDGE_GB_PER_SECOND:.0f} "
              f"| {run['memory'] / largest:.2f} |")


if __name__ == "__main__":
    main()
