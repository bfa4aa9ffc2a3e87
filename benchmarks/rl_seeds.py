"""Does RL learn, on every seed? Whole tiny runs, and held-out accuracy before and after.

    python benchmarks/rl_seeds.py [SEED ...]        (0 1 2 when none is given)

Each run goes to runs/seed_N; what is done there is not done again. Prints Markdown for docs/benchmarks.md.
"""

import subprocess
import sys
from pathlib import Path

from glm.metrics.read import read_lines

RUNFILE = Path(__file__).parents[1] / "configs" / "glm45" / "tiny.yaml"
STAGES = (
    "tokenizer", "pretrain_general", "pretrain_code_reasoning", "prepare_midtrain", "midtrain_repo_code", "midtrain_reasoning",
    "midtrain_long_context", "sft_cold_start", "rl_reasoning",
)
STAGE = "rl_reasoning"


def evaluations(folder: Path) -> tuple[dict, dict, float]:
    """The metric lines before and after, and the seconds between them."""
    lines = [line for line in read_lines(folder / "metrics.jsonl").records if line["stage"] == STAGE and "eval/phase" in line]
    before = next(line for line in lines if line["eval/phase"] == "before")
    after = next(line for line in reversed(lines) if line["eval/phase"] == "after")
    return before, after, after["time_seconds"] - after["eval/seconds"] - before["time_seconds"]


def told(line: dict, kind: str) -> str:
    return f"{100 * line[f'eval/{kind}_accuracy']:.1f} ± {100 * line[f'eval/{kind}_standard_error']:.1f}"


def main(seeds: list[int]) -> None:
    results = {}
    for seed in seeds:
        folder = Path("runs") / f"seed_{seed}"
        done = subprocess.run(
            [sys.executable, "-m", "glm.cli", "run", str(RUNFILE), *STAGES, f"seed={seed}", f"run_folder={folder}"],
            stdout=subprocess.DEVNULL,
        )
        if done.returncode:
            raise SystemExit(f"seed {seed} failed; the same command continues it")
        results[seed] = evaluations(folder)
    print("| seed | sampled before | sampled after | gain | factor | greedy before | greedy after | think rate | RL seconds |")
    print("| ---: |" + " ---: |" * 8)
    for seed, (before, after, seconds) in results.items():
        low, high = before["eval/sampled_accuracy"], after["eval/sampled_accuracy"]
        thinking = f"{before['eval/sampled_thinking']:.2f} → {after['eval/sampled_thinking']:.2f}"
        print(f"| {seed} | {told(before, 'sampled')} | {told(after, 'sampled')} | {100 * (high - low):+.1f} | {high / low:.2f} "
              f"| {told(before, 'greedy')} | {told(after, 'greedy')} | {thinking} | {seconds:.0f} |")
    tasks = sorted({key.split("/")[1] for before, _, _ in results.values() for key in before
                    if key.startswith("eval/") and key.endswith("/sampled")})
    print("\nPer task, sampled / greedy, before → after:\n")
    print("| task | " + " | ".join(f"seed {seed}" for seed in results) + " |")
    print("| --- |" + " ---: |" * len(results))
    for task in tasks:
        cells = [
            " / ".join(f"{before[f'eval/{task}/{kind}']:.2f} → {after[f'eval/{task}/{kind}']:.2f}" for kind in ("sampled", "greedy"))
            for before, after, _ in results.values()
        ]
        print(f"| {task} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [0, 1, 2])
