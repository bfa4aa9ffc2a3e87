"""What ``glm show`` prints."""

import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from glm.errors import RecipeError
from glm.launch.stages import select
from glm.recipe.compose import load_run
from glm.recipe.saved import dump_recipe, flatten
from glm.recipe.schema import ModelStageRecipe
from glm.recipe.source import shown
from glm.recipe.units import format_count
from glm.train.plan import schedule_table


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
        console().print(table)
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
                table.add_row(stage, *(short(value) for value in values.values()))
        table.add_section()
    if not as_json:
        console().print(table)
    return 0


def console() -> Console:
    """As wide as the terminal; in a file wide enough that no row wraps."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def short(value: object) -> str:
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
