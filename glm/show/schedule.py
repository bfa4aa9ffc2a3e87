"""The schedules of a run over its tokens: as a table, as JSON, as a sketch for a terminal, as a picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from glm.checkpoint.run_folder import RunFolder
from glm.errors import RecipeError
from glm.launch.stages import select
from glm.recipe.compose import Run, load_run
from glm.recipe.schema import ModelStageRecipe
from glm.recipe.units import format_count, parse_count
from glm.show.text import console, short
from glm.train.plan import Progress, StepPlan, plan_step, schedule_table, stage_at, total_tokens

LABELS = {
    "run_tokens": "run tokens", "stage": "stage", "lr": "lr", "batch_tokens": "batch tokens", "sequence_length": "length",
    "mtp_weight": "MTP weight", "bias_update_rate": "bias rate", "rotary_base": "RoPE base",
}
"""The keys of one line of JSON, and their headings in the table."""
CURVES = [key for key in LABELS if key not in ("run_tokens", "stage")]
LOGARITHMIC = ("sequence_length", "rotary_base")
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Line:
    """The step that begins at a point of a stage."""

    run_tokens: int
    """On the run's clock; stages after it, which have clocks of their own, go on counting."""
    stage: str
    plan: StepPlan

    def values(self) -> dict[str, object]:
        plan = self.plan
        return dict(zip(LABELS, (
            self.run_tokens, self.stage, plan.lr, plan.tokens, plan.sequence_length, plan.mtp_weight, plan.bias_update_rate, plan.rotary_base,
        ), strict=True))


def show_schedule(
    runfile: str, stages: list[str], changes: list[str], *, as_json: bool, at: Sequence[str] = (), plot: str | None = None, rows: int = 8
) -> int:
    """Without ``at``: points spread over every training stage, a sketch, and a picture at ``plot`` (none: RUN/schedule.svg).

    With ``at``: the plan of the step that begins at each of these run tokens, nothing else.
    """
    run = load_run(runfile, changes)
    trained = {stage: run.stages[stage] for stage in select(run, stages) if isinstance(run.stages[stage], ModelStageRecipe)}
    if not trained:
        raise RecipeError(", ".join(stages), "no stage that trains", "a stage with a schedule", "name one that trains, or none for all")
    lines = points_at(trained, [_tokens(text) for text in at]) if at else spread(run, trained, rows)
    if as_json:
        for line in lines:
            print(json.dumps(line.values()))
    else:
        print_table(run.name, lines)
    if at and plot is None or as_json and plot is None:
        return 0
    drawn = _on_one_clock(trained)
    if not as_json:
        console().print(sketch(drawn), highlight=False)
    path = RunFolder(run.run_folder).schedule if plot is None else Path(plot).expanduser()
    draw(drawn, path, run.name)
    if not as_json:
        console().print(f"glm show: {path}", highlight=False, soft_wrap=True)
    return 0


def points_at(trained: Mapping[str, ModelStageRecipe], tokens: Sequence[int]) -> list[Line]:
    """The step that begins at each point of the run's clock; see ``stage_at`` for edges and for what it raises."""
    lines = []
    for point in tokens:
        stage, inside = stage_at(trained, point)
        lines.append(Line(point, stage, plan_step(trained[stage], Progress(stage_tokens=inside))))
    return lines


def spread(run: Run, trained: Mapping[str, ModelStageRecipe], rows: int) -> list[Line]:
    """Up to ``rows`` steps of every stage, the first and the last included."""
    ends: dict[str | None, int] = {None: 0}
    for stage, recipe in run.stages.items():
        if isinstance(recipe, ModelStageRecipe):
            ends[stage] = ends[recipe.parent] + total_tokens(recipe)
    return [
        Line(ends[recipe.parent] + plan.stage_tokens, stage, plan) for stage, recipe in trained.items() for plan in schedule_table(recipe, rows)
    ]


def print_table(name: str, lines: Sequence[Line]) -> None:
    table, last = Table(*LABELS.values(), title=name, title_justify="left"), None
    for line in lines:
        if last not in (None, line.stage):
            table.add_section()
        table.add_row(*(short(value) for value in line.values().values()))
        last = line.stage
    console().print(table)


def sketch(trained: Mapping[str, ModelStageRecipe], columns: int = 96) -> str:
    """One row of blocks a schedule, each from its least to its greatest value, over the tokens of ``trained``."""
    points = points_at(trained, _grid(trained, columns))
    rows = []
    for key in CURVES:
        values = [float(point.values()[key]) for point in points]
        least, most = min(values), max(values)
        height = [0.0 if most == least else (value - least) / (most - least) for value in values]
        blocks = "".join(BLOCKS[round(share * (len(BLOCKS) - 1))] for share in height)
        ends = (short(points[0].values()[key]), short(points[-1].values()[key]))
        rows.append(f"{LABELS[key]:<13}{blocks}  {ends[0] if len(set(values)) == 1 else ' to '.join(ends)}")
    edges = {point.stage: index for index, point in reversed(list(enumerate(points)))}
    axis = "".join("│" if column in edges.values() else "─" for column in range(len(points)))
    ends = f"{format_count(points[0].run_tokens)} to {format_count(points[-1].run_tokens)} tokens"
    return "\n".join([*rows, f"{'stages':<13}{axis}  {ends}"])


def draw(trained: Mapping[str, ModelStageRecipe], path: Path, title: str) -> None:
    """Six plots over the tokens of ``trained``, stages shaded in turn. The file's ending says its format (svg, png, pdf)."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    formats = pyplot.figure(figsize=(1, 1)).canvas.get_supported_filetypes()
    pyplot.close()
    if path.suffix[1:].lower() not in formats:
        raise RecipeError(f"--plot {path}", f"a file ending in {path.suffix or 'nothing'}", "a picture: .svg, .png or .pdf", f"{path.with_suffix('.svg')}")
    points = points_at(trained, _grid(trained, 600))
    scale, unit = next(((10**power, name) for power, name in ((12, "T"), (9, "B"), (6, "M"), (3, "K")) if points[-1].run_tokens >= 10**power), (1, ""))
    x = [point.run_tokens / scale for point in points]
    figure, axes = pyplot.subplots(3, 2, figsize=(11, 8), sharex=True, layout="constrained")
    for axis, key in zip(axes.flat, CURVES):
        axis.plot(x, [point.values()[key] for point in points], linewidth=1.6, drawstyle="default" if key == "lr" else "steps-post")
        axis.set_title(LABELS[key], fontsize=10)
        axis.set_yscale("log", base=2 if key == "sequence_length" else 10) if key in LOGARITHMIC else axis.set_ylim(bottom=0)
        for index, stage in enumerate(dict.fromkeys(point.stage for point in points)):
            inside = [place for place, point in zip(x, points) if point.stage == stage]
            axis.axvspan(inside[0], inside[-1], alpha=0.14 if index % 2 else 0.05, color="C0", linewidth=0, label=stage)
    for axis in axes[-1]:
        axis.set_xlabel(f"run tokens ({unit})" if unit else "run tokens")
    figure.suptitle(f"{title}: {', '.join(dict.fromkeys(point.stage for point in points))}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.draft{path.suffix}")
    figure.savefig(draft)
    pyplot.close(figure)
    draft.replace(path)


def _on_one_clock(trained: Mapping[str, ModelStageRecipe]) -> Mapping[str, ModelStageRecipe]:
    """The stages on the run's clock; where there is none, the first of those that have their own."""
    clocked = {stage: recipe for stage, recipe in trained.items() if recipe.schedule.clock == "run"}
    return clocked or dict(list(trained.items())[:1])


def _grid(trained: Mapping[str, ModelStageRecipe], count: int) -> list[int]:
    """Points spread evenly over the stages, in order, and the first point of each; stages that are not there leave no gap."""
    on_run = any(recipe.schedule.clock == "run" for recipe in trained.values())
    spans = [((recipe.run_tokens_before if on_run else 0), total_tokens(recipe)) for recipe in trained.values()]
    whole = sum(tokens for _, tokens in spans)
    points = set()
    for start, tokens in spans:
        own = max(1, round(count * tokens / whole))
        points |= {start + tokens * index // own for index in range(own)}
    return sorted(points | {spans[-1][0] + spans[-1][1]})


def _tokens(text: str) -> int:
    try:
        return parse_count(int(text) if text.isdigit() else text)
    except ValueError as problem:
        raise RecipeError(f"--at {text}", repr(text), "a count of tokens such as 15T, 500B or 4096", "write it so") from problem
