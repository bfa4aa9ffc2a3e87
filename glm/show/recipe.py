"""The resolved recipe of a stage, each value with the file and line that set it."""

import json

from rich.markup import escape
from rich.table import Table

from glm.errors import RecipeError
from glm.launch.stages import select
from glm.recipe.compose import load_run
from glm.recipe.saved import dump_recipe, flatten
from glm.recipe.source import shown
from glm.show.text import console


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


def _text(value: object) -> str:
    """As JSON, and not read as rich's markup: ``["embedding"]`` keeps its brackets."""
    return escape(json.dumps(value) if isinstance(value, (dict, list, bool)) or value is None else str(value))
