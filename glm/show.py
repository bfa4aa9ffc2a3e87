"""What ``glm show`` and ``glm check`` print."""

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from glm.errors import RecipeError, UserError
from glm.launch.stages import select
from glm.model.size import kv_bytes_per_token, parameters, training_flops_per_token
from glm.recipe.compose import Run, load_run
from glm.recipe.saved import dump_recipe, flatten
from glm.recipe.schema import ModelStageRecipe, TrainRecipe
from glm.recipe.source import shown
from glm.recipe.units import format_count
from glm.train.plan import count_steps, data_parallel_size, schedule_table

BYTES = {"fp32": 4, "bf16": 2}


def show_recipe(runfile: str, stages: list[str], changes: list[str], *, as_json: bool) -> int:
    """The resolved recipe of each named stage; each value with the file and line that set it."""
    run = load_run(runfile, changes)
    if not stages:
        raise RecipeError(shown(run.path), "no stage named", "glm show RUNFILE STAGE, or --schedule", f"one of {', '.join(run.stages)}")
    for stage in select(run, stages):
        recipe, places = dump_recipe(run.stages[stage]), run.origins[stage]
        rows = [(key, value, places.get(key, "default")) for key, value in flatten(recipe).items()]
        if as_json:
            for key, value, origin in rows:
                print(json.dumps({"stage": stage, "key": key, "value": value, "origin": origin}))
            continue
        table = Table("key", "value", "set by", title=f"{run.name}: {stage}", title_justify="left")
        for key, value, origin in rows:
            table.add_row(key, _text(value), f"[dim]{origin}[/]" if origin == "default" else origin)
        _console().print(table)
    return 0


def show_schedule(runfile: str, stages: list[str], changes: list[str], *, as_json: bool, rows: int = 8) -> int:
    """What the schedules say at points spread over every training stage."""
    run = load_run(runfile, changes)
    table = Table("stage", "step", "run tokens", "lr", "batch tokens", "length", "rotary base", "MTP weight", "bias rate", title=run.name)
    for stage in select(run, stages):
        recipe = run.stages[stage]
        if not isinstance(recipe, ModelStageRecipe):
            continue
        for plan in schedule_table(recipe, rows):
            values = {
                "step": plan.step, "run_tokens": plan.run_tokens, "lr": plan.lr, "batch_tokens": plan.tokens,
                "sequence_length": plan.sequence_length, "rotary_base": plan.rotary_base, "mtp_weight": plan.mtp_weight,
                "bias_update_rate": plan.bias_update_rate,
            }
            if as_json:
                print(json.dumps({"stage": stage, **values}))
            else:
                table.add_row(stage, *(_short(value) for value in values.values()))
        table.add_section()
    if not as_json:
        _console().print(table)
    return 0


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
    """The numbers ``glm check`` prints, as JSON values."""
    first = next(iter(run.stages.values()))
    counted = parameters(first.model)
    stages = []
    for stage, recipe in run.stages.items():
        entry = {"stage": stage, "from": recipe.parent, "ranks": recipe.world_size}
        if isinstance(recipe, ModelStageRecipe):
            entry |= {
                "steps": count_steps(recipe), "sequence_length": recipe.sequence_length, "data_parallel": data_parallel_size(recipe),
                "flops_per_token": training_flops_per_token(recipe.model, recipe.sequence_length),
            }
        if isinstance(recipe, TrainRecipe):
            sources = {name: round(source.share * recipe.tokens) for name, source in recipe.data.sources.items()}
            entry |= {"tokens": recipe.tokens, "tokens_per_source": sources, "flops": entry["flops_per_token"] * recipe.tokens}
        stages.append(entry)
    return {
        "run": run.name, "file": shown(run.path), "parameters": counted.total, "active_parameters": counted.active,
        "conventions": {name: {"total": total, "active": active} for name, (total, active) in counted.conventions().items()},
        "kv_bytes_per_token": kv_bytes_per_token(first.model, BYTES[first.precision.params]), "stages": stages,
    }


def _print_summary(summary: dict) -> None:
    console = _console()
    console.print(
        f"[bold]{summary['run']}[/] ({summary['file']}): valid; {summary['parameters']:,} parameters, {summary['active_parameters']:,} active, "
        f"{summary['kv_bytes_per_token'] / 1024:g} KiB of keys and values a token", highlight=False, soft_wrap=True,
    )
    sizes = Table("parameters of", "total", "active")
    for name, numbers in summary["conventions"].items():
        sizes.add_row(name, f"{numbers['total']:,}", f"{numbers['active']:,}")
    table = Table("stage", "from", "ranks", "steps", "tokens", "length", "FLOP a token", "FLOP", "tokens per source")
    for entry in summary["stages"]:
        sources = ", ".join(f"{name} {_short(tokens)}" for name, tokens in entry.get("tokens_per_source", {}).items())
        table.add_row(
            entry["stage"], entry["from"] or "-", *(_short(entry.get(key, "")) for key in ("ranks", "steps", "tokens", "sequence_length")),
            *(f"{entry[key]:.3g}" if key in entry else "" for key in ("flops_per_token", "flops")), sources,
        )
    console.print(sizes)
    console.print(table)


def _console() -> Console:
    """As wide as the terminal; in a file wide enough that no row wraps."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def _configs() -> Path:
    return Path(__file__).parents[1] / "configs" / "glm45"


def _short(value: object) -> str:
    """Counts as recipes spell them where that is exact and short, else to five digits: 15T, 63.963M."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if not isinstance(value, int) or value < 10**6 or len(format_count(value)) <= 6:
        return format_count(value) if isinstance(value, int) else str(value)
    factor, suffix = next((factor, suffix) for factor, suffix in ((10**12, "T"), (10**9, "B"), (10**6, "M")) if value >= factor)
    return f"{value / factor:.5g}{suffix}"


def _text(value: object) -> str:
    """As JSON, and not read as rich's markup: ``["embedding"]`` keeps its brackets."""
    return escape(json.dumps(value) if isinstance(value, (dict, list, bool)) or value is None else str(value))
