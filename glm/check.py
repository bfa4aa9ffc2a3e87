"""What ``glm check`` prints: whether run files are valid, and what they amount to."""

import json
from pathlib import Path

from rich.table import Table

from glm.errors import RecipeError, UserError
from glm.model.size import kv_bytes_per_token, parameters, training_flops_per_token
from glm.recipe.compose import Run, load_run
from glm.recipe.schema import ModelStageRecipe, TrainRecipe
from glm.recipe.source import shown
from glm.show import console, short
from glm.train.plan import count_steps, data_parallel_size

BYTES = {"fp32": 4, "bf16": 2}
LENGTHS = (4096, 32_768, 131_072)
"""Sequence lengths a FLOP count is always given for, where the model reaches them; the stages' own come on top."""


def check_runs(files: list[str], changes: list[str], *, as_json: bool) -> int:
    """Reads every run file and prints what it amounts to. All are read; 2 if one of them is not valid."""
    files = files or [str(path) for path in sorted(_configs().glob("*.yaml"))]
    wrong = []
    for file in files:
        try:
            summary = summarize(load_run(file, changes))
        except UserError as problem:
            wrong.append(problem)
            continue
        if as_json:
            print(json.dumps(summary))
        else:
            _print_summary(summary)
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        raise RecipeError(
            f"{len(wrong)} of {len(files)} run files", "\n\n".join(map(str, wrong)).replace("\n", "\n  "), "valid run files", "correct the above"
        )
    return 0


def summarize(run: Run) -> dict:
    """The numbers ``glm check`` prints, as JSON values. ``flops_per_token`` maps sequence lengths to training FLOPs."""
    first = next(iter(run.stages.values()))
    model, counted = first.model, parameters(first.model)
    lengths = {length for length in LENGTHS if length <= model.max_position}
    stages = []
    for stage, recipe in run.stages.items():
        entry = {"stage": stage, "from": recipe.parent, "ranks": recipe.world_size}
        if isinstance(recipe, ModelStageRecipe):
            lengths.add(recipe.sequence_length)
            entry |= {
                "steps": count_steps(recipe), "sequence_length": recipe.sequence_length, "data_parallel": data_parallel_size(recipe),
                "flops_per_token": training_flops_per_token(model, recipe.sequence_length),
            }
        if isinstance(recipe, TrainRecipe):
            sources = {name: round(source.share * recipe.tokens) for name, source in recipe.data.sources.items()}
            entry |= {"tokens": recipe.tokens, "tokens_per_source": sources, "flops": entry["flops_per_token"] * recipe.tokens}
        stages.append(entry)
    return {
        "run": run.name, "file": shown(run.path),
        "parameters": {
            "total": counted.total, "total_without_mtp": counted.total_without_mtp, "active": counted.active, "router_bias": counted.router_bias,
            "conventions": {name: {"total": total, "active": active} for name, (total, active) in counted.conventions().items()},
        },
        "flops_per_token": {str(length): training_flops_per_token(model, length) for length in sorted(lengths)},
        "kv_bytes_per_token": kv_bytes_per_token(model, BYTES[first.precision.params]),
        "stages": stages,
    }


def _print_summary(summary: dict) -> None:
    out, counted = console(), summary["parameters"]
    out.print(
        f"[bold]{summary['run']}[/] ({summary['file']}): valid; {counted['total']:,} parameters, {counted['active']:,} active, "
        f"{summary['kv_bytes_per_token'] / 1024:g} KiB of keys and values a token", highlight=False, soft_wrap=True,
    )
    sizes = Table("parameters of", "total", "active")
    for name, numbers in counted["conventions"].items():
        sizes.add_row(name, f"{numbers['total']:,}", f"{numbers['active']:,}")
    sizes.add_row("router bias (fp32, in none of the above)", f"{counted['router_bias']:,}", "")
    table = Table("stage", "from", "ranks", "steps", "tokens", "length", "FLOP a token", "FLOP", "tokens per source")
    for entry in summary["stages"]:
        sources = ", ".join(f"{name} {short(tokens)}" for name, tokens in entry.get("tokens_per_source", {}).items())
        table.add_row(
            entry["stage"], entry["from"] or "-", *(short(entry.get(key, "")) for key in ("ranks", "steps", "tokens", "sequence_length")),
            *(f"{entry[key]:.4g}" if key in entry else "" for key in ("flops_per_token", "flops")), sources,
        )
    out.print(sizes)
    costs = (f"{flops / 1e9:,.4g} GFLOP at {int(length):,}" for length, flops in summary["flops_per_token"].items())
    out.print(f"training a token: {', '.join(costs)} tokens of context", highlight=False, soft_wrap=True)
    out.print(table)


def _configs() -> Path:
    return Path(__file__).parents[1] / "configs" / "glm45"
