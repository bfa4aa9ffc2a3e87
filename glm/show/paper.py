"""The resolved recipe of a run beside the numbers of the technical report (glm/show/paper.yaml): equal, differs, or open in the report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from glm.errors import RecipeError
from glm.model.size import parameters
from glm.recipe.compose import Run, load_run
from glm.recipe.saved import dump_recipe, flatten
from glm.recipe.schema import TrainRecipe
from glm.recipe.source import plain, read_yaml
from glm.recipe.units import parse_count
from glm.show.text import console, short

FACTS = Path(__file__).with_name("paper.yaml")
MARKS = {"equal": "green", "differs": "bold red", "open": "yellow"}
ABSENT = "not in this run"
PRETRAINING = ("pretrain.train", "midtrain.train")
"""Mains of the stages a fact with ``in: run`` is read from, whatever their clock says."""


@dataclass(frozen=True)
class Fact:
    """One thing the report says (``paper``) or leaves open (``open``: our choice, why)."""

    topic: str
    id: str
    claim: str
    section: str
    paper: object = None
    open: str | None = None
    recipe: str | None = None
    where: str | tuple[str, ...] = "run"
    fixed: object = None
    computed: str | None = None
    note: str = ""
    code: str = ""
    test: str = ""


@dataclass(frozen=True)
class Row:
    """A fact beside what a run does. ``paper`` and ``ours`` are one value, or one for each stage where these are not all alike."""

    fact: Fact
    paper: object
    ours: object
    mark: str
    places: tuple[str, ...] = field(default=())
    """Where the values were set."""

    def values(self) -> dict[str, object]:
        fact = self.fact
        return {
            "topic": fact.topic, "id": fact.id, "claim": fact.claim, "section": fact.section, "paper": self.paper, "ours": self.ours,
            "mark": self.mark, "recipe_key": fact.recipe, "set_by": list(self.places), "note": fact.open or fact.note, "code": fact.code,
            "test": fact.test,
        }


def show_paper(runfile: str, stages: list[str], changes: list[str], *, as_json: bool) -> int:
    """Every fact of the report beside the recipe of a run."""
    run = load_run(runfile, changes)
    if stages:
        raise RecipeError(", ".join(stages), "stages with --paper", "none: the report is about whole runs", "glm show RUNFILE --paper")
    rows = compare(run, facts())
    if as_json:
        for row in rows:
            print(json.dumps(row.values()))
        return 0
    table = Table("report", "section", "report says", "recipe", "mark", "key", "note", title=run.name, title_justify="left")
    topic = None
    for row in rows:
        if row.fact.topic != topic:
            topic = row.fact.topic
            table.add_section()
            table.add_row(f"[bold]{topic}[/]")
        said = "open" if row.mark == "open" else told(row.paper)
        key = row.fact.recipe or (f"({row.fact.computed})" if row.fact.computed else "(code)")
        table.add_row(
            row.fact.claim, row.fact.section, escape(said), escape(told(row.ours)), f"[{MARKS[row.mark]}]{row.mark}[/]", key,
            escape(row.fact.open or row.fact.note),
        )
    console().print(table)
    counts = {mark: sum(row.mark == mark for row in rows) for mark in MARKS}
    console().print(", ".join(f"{count} {mark}" for mark, count in counts.items()), highlight=False)
    return 0


def facts(path: Path = FACTS) -> list[Fact]:
    """In the order of the file; counts written as ``15T`` are numbers."""
    found = []
    for topic, entries in plain(read_yaml(path)).items():
        for entry in entries:
            where = entry.pop("in", "run")
            paper = entry.pop("paper", None)
            found.append(Fact(topic=topic, where=where if isinstance(where, str) else tuple(where), paper=_numbers(paper), **entry))
    return found


def compare(run: Run, said: Sequence[Fact]) -> list[Row]:
    """One row a fact, in order."""
    dumped = {stage: dump_recipe(recipe) for stage, recipe in run.stages.items()}
    values = {stage: recipe | flatten(recipe) for stage, recipe in dumped.items()}
    return [_row(fact, run, values, reported_model(run)) for fact in said]


def reported_model(run: Run) -> str:
    """Which of the report's two models a run is compared with: Air if it names model air, else GLM-4.5."""
    places = " ".join(place for stage in run.origins.values() for key, place in stage.items() if key.startswith("model."))
    return "air" if "model/air.yaml:" in places else "355b"


def _row(fact: Fact, run: Run, recipes: Mapping[str, Mapping[str, object]], model: str) -> Row:
    paper = fact.paper[model] if isinstance(fact.paper, dict) and model in fact.paper else fact.paper
    places: tuple[str, ...] = ()
    if fact.recipe:
        stages = _stages(fact, run)
        values = {stage: recipes.get(stage, {}).get(fact.recipe, ABSENT) for stage in stages}
        places = tuple(dict.fromkeys(run.origins[stage].get(fact.recipe, "default") for stage in stages if stage in run.stages))
        wanted = {stage: paper[stage] if isinstance(paper, dict) else paper for stage in stages}
        equal, paper, ours = values == wanted, _one(wanted), _one(values)
    else:
        ours = COMPUTED[fact.computed](run, model) if fact.computed else fact.fixed
        equal = ours == paper
    return Row(fact, None if fact.open else paper, ours, "open" if fact.open else "equal" if equal else "differs", places)


def _stages(fact: Fact, run: Run) -> list[str]:
    """The stages a fact is read from, those included that the report has and the run has not."""
    if fact.where == "model":
        return [next(iter(run.stages))]
    if fact.where != "run":
        return list(fact.where)
    return list(fact.paper) if _by_stage(fact.paper) else [name for name, recipe in run.stages.items() if recipe.main in PRETRAINING]


def _by_stage(paper: object) -> bool:
    return isinstance(paper, dict) and any(name.startswith(("pretrain_", "midtrain_")) for name in paper)


def _one(values: Mapping[str, object]) -> object:
    """The one value all stages have, else the map."""
    distinct = [value for index, value in enumerate(values.values()) if value not in list(values.values())[:index]]
    return distinct[0] if len(distinct) == 1 else dict(values)


def told(value: object) -> str:
    """For a cell of a table: ``0.3, then 0.1``."""
    if isinstance(value, dict) and value and all("_" in name for name in value):
        steps = [short(part) for part in value.values()]
        return ", then ".join(part for index, part in enumerate(steps) if index == 0 or part != steps[index - 1])
    if isinstance(value, bool):
        return "yes" if value else "no"
    return json.dumps(value) if isinstance(value, (dict, list)) else short(value)


def _numbers(value: object) -> object:
    if isinstance(value, dict):
        return {key: _numbers(child) for key, child in value.items()}
    if isinstance(value, str) and value[:1].isdigit():
        return parse_count(value)
    return value


def _total_parameters(run: Run, model: str) -> int:
    """The report's 355 counts body and MTP layer, its 106 the body (see glm/model/size.py)."""
    return round(_counted(run, model)[0] / 10**9)


def _active_parameters(run: Run, model: str) -> int:
    return round(_counted(run, model)[1] / 10**9)


def _counted(run: Run, model: str) -> tuple[int, int]:
    shape = next(iter(run.stages.values())).model
    return parameters(shape).conventions()["body" if model == "air" else "body and MTP"]


def _run_tokens(run: Run, model: str) -> int:
    """Of the stages on the run's clock."""
    ends = [
        recipe.run_tokens_before + recipe.tokens for recipe in run.stages.values()
        if isinstance(recipe, TrainRecipe) and recipe.schedule.clock == "run"
    ]
    return max(ends, default=0)


COMPUTED = {"total_parameters": _total_parameters, "active_parameters": _active_parameters, "run_tokens": _run_tokens}
