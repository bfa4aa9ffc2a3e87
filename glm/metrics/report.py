"""One self-contained HTML page of a run: what each stage did, its curves, its samples, its recipe.

A run that is only partly done gives a page with what there is; what is not there yet is said in a sentence.
"""

import json
import math
from pathlib import Path

import numpy as np

from glm.checkpoint.run_folder import RunFolder, write_atomically
from glm.errors import DataError
from glm.metrics import goodput, page
from glm.metrics.console import short_count
from glm.metrics.figures import PALETTE, Curve, curves, heat_maps, smoothed
from glm.metrics.read import RunMetrics, StageMetrics, read_lines, read_run
from glm.metrics.report_layers import layer_figures
from glm.metrics.report_parts import part_figures
from glm.metrics.report_rl import rl_parts
from glm.metrics.stage import Stage

_MAX_LAYERS_SHOWN = 6
_SAMPLES_SHOWN = 8
_TRAINING_FIGURES = (  # metric, line kind, axis label, caption
    ("validation/loss", "dots", "validation loss", "Loss on held-out text."),
    ("train/lr", "line", "learning rate", "Learning rate."),
    ("train/tokens", "steps", "tokens a step", "Batch size."),
    ("train/grad_norm", "smooth", "gradient norm", "Gradient norm before clipping."),
    ("train/tokens_per_second", "smooth", "tokens a second", "Throughput of all ranks."),
    ("train/tflops", "smooth", "TFLOP/s", "Operations of a rank and second: forward and backward, recomputation not counted."),
    ("train/mfu", "smooth", "MFU", "Share of the peak the hardware file declares."),
    ("mtp/accuracy", "smooth", "share", "Tokens that were the MTP layer's first choice."),
    ("train/mtp_weight", "steps", "MTP weight", "Weight of the MTP loss."),
    ("train/bias_update_rate", "steps", "bias update rate", "Step of the router bias."),
)


def write_report(run_folder: Path) -> Path:
    """Writes RUN/report.html and returns its path. Raises DataError when the folder holds no stage at all."""
    folder = RunFolder(Path(run_folder))
    metrics = read_run(folder.root)
    stages = _stages(folder, metrics)
    if not stages:
        raise DataError(where=str(folder.root), found="neither metrics.jsonl nor stages/", expected="the folder of a run",
                        todo="pass the folder that `glm run` printed, usually runs/NAME")
    name = next((stage.recipe["name"] for stage in stages if stage.recipe.get("name")), folder.root.resolve().name)
    training = [stage for stage in stages if stage.is_training]
    parts = [
        f"<h1>{page.text(name)}</h1>", page.sentence(_subtitle(stages)), page.cards(_facts(stages)),
        page.section("Stages", _summary(stages), *_goodput(folder, stages)),
        page.section("Training", *_training(training)),
        page.section("Sources, positions, time", *part_figures(training)),
        page.section("Expert load", *_expert_load(training)),
        page.section("Layers", *layer_figures(training)),
        page.section("Reinforcement learning", *rl_parts([(stage.name, stage.metrics, stage.recipe) for stage in stages])),
        page.section("Samples", *_samples(folder, stages)),
        page.section("Recipes", *_recipes(stages)),
    ]
    if metrics.torn:
        parts.append(page.sentence(f"{metrics.torn} torn line(s) of metrics.jsonl were skipped."))
    write_atomically(folder.report, page.page(f"{name}: run report", parts))
    return folder.report


def _stages(folder: RunFolder, metrics: RunMetrics) -> list[Stage]:
    """Every stage with a folder or a metric line, in the order they were started."""
    names = dict.fromkeys(metrics.stages)
    if (folder.root / "stages").is_dir():
        names |= dict.fromkeys(sorted(path.name for path in (folder.root / "stages").iterdir() if path.is_dir()))
    order = list(names)
    written = {name: folder.recipe(name).stat().st_mtime_ns if folder.recipe(name).exists() else math.inf for name in order}
    stages, end = [], 0.0
    for index, name in enumerate(sorted(order, key=lambda name: (written[name], order.index(name)))):
        recipe = json.loads(folder.recipe(name).read_text()) if folder.recipe(name).exists() else {}
        own = metrics.stages.get(name, StageMetrics(name))
        _, tokens = own.series("train/run_tokens")
        # Stages that branch off the same parent repeat its run tokens: they are drawn one after the other instead.
        offset = max(0.0, end - (tokens[0] - (own.first("train/tokens") or 0.0))) if tokens else 0.0
        end = tokens[-1] + offset if tokens else end
        stages.append(Stage(name, own, recipe, folder.done(name).exists(), PALETTE[index % len(PALETTE)], offset))
    return stages


def _subtitle(stages: list[Stage]) -> str:
    model = next((stage.recipe["model"] for stage in stages if stage.recipe.get("model")), None)
    if not model:
        return "The recipes of this run are not in its folder."
    keys = (("num_layers", "layers"), ("hidden_size", "wide"), ("num_experts", "experts"),
            ("experts_per_token", "used per token"), ("num_mtp_layers", "MTP layer"), ("vocab_size", "tokens in the vocabulary"))
    return "Model: " + ", ".join(f"{model[key]} {words}" for key, words in keys if key in model) + "."


def _facts(stages: list[Stage]) -> list[tuple[str, object]]:
    tokens = sum(stage.metrics.last("train/stage_tokens") or 0 for stage in stages)
    facts = [("stages done", f"{sum(stage.done for stage in stages)} of {len(stages)}"),
             ("training tokens", short_count(tokens)),
             ("time in stages", _duration(sum(stage.metrics.seconds for stage in stages)))]
    for stage in reversed(stages):
        if stage.is_training:
            facts.append((f"last loss of {stage.name}", _number(stage.metrics.last("train/loss"), ".3f")))
            break
    for stage in reversed(stages):
        by_phase = {line.get("eval/phase"): line for line in stage.metrics.having("eval/sampled_accuracy")}
        if {"before", "after"} <= by_phase.keys():
            change = " → ".join(f"{100 * by_phase[phase]['eval/sampled_accuracy']:.0f}%" for phase in ("before", "after"))
            facts.append((f"held-out accuracy, {stage.name}", change))
            break
    return facts


def _summary(stages: list[Stage]) -> str:
    rows = []
    for stage in stages:
        own, what = stage.metrics, "train/loss" if stage.is_training else "rl/reward"
        rows.append((
            page.Raw(page.dot(stage.color) + page.text(stage.name)),
            stage.recipe.get("main", ""),
            stage.recipe.get("from") or "",
            "done" if stage.done else "not finished",
            short_count(own.last("train/stage_tokens") or 0) if stage.is_training else "",
            own.steps or "",
            _duration(own.seconds) if own.lines else "",
            _number(own.first(what), ".3f"),
            _number(own.last(what), ".3f"),
            what.split("/")[1] if own.having(what) else "",
            _number(own.last("validation/loss"), ".3f"),
        ))
    headers = ("stage", "main", "from", "state", "tokens", "steps", "time", "first", "last", "of", "validation")
    return page.table(headers, rows, words=4)


def _goodput(folder: RunFolder, stages: list[Stage]) -> list[str]:
    told = [(stage.name, goodput.of_stage(folder, stage.name)) for stage in stages]
    return [page.sentence(f"{name}: {one.sentence}.") for name, one in told if one]


def _training(stages: list[Stage]) -> list[str]:
    """Curves of all training stages on one axis of run tokens."""
    if not stages:
        return [page.sentence("No training stage has logged a step yet.")]

    def plot(*wanted: tuple[str, str, str], **options) -> str:
        """``wanted``: (metric, line kind, words before the stage's name in the legend)."""
        lines = []
        for stage in stages:
            for name, kind, words in wanted:
                x, y = stage.on_run_tokens(name)
                if kind == "smooth":
                    lines.append(Curve("", x, y, stage.color, "faint"))
                    y, kind = smoothed(y, max(1, len(y) // 40)), "line"
                lines.append(Curve(f"{words}{stage.name}".strip(), x, y, stage.color, kind))
        return curves(lines, x_label="run tokens", **options) if any(len(line.x) for line in lines) else ""

    loss = plot(("train/loss", "smooth", ""), ("train/mtp_loss", "dashed", "_"), y_label="loss", wide=True)
    drawn = [(loss, "Next-token loss (faint: every step) and, dashed, the MTP head. Colours as in the table above.", True)]
    for name, kind, y_label, caption in _TRAINING_FIGURES:
        svg = plot((name, kind, ""), y_label=y_label, legend=False, log=name == "train/grad_norm")
        drawn.append((svg, caption, False))
    moved = [stage.name for stage in stages if stage.offset]
    shown = page.figures([page.figure(svg, caption, full) for svg, caption, full in drawn if svg])
    if not moved:
        return [shown]
    return [shown, page.sentence(f"Drawn behind the stage before, since their own token counts overlap: {', '.join(moved)}.")]


def _expert_load(stages: list[Stage]) -> list[str]:
    x, loads = [], []
    for stage in stages:
        for line in stage.metrics.having("balance/load"):
            load = np.asarray(line["balance/load"], float)
            if load.ndim == 2 and (not loads or load.shape == loads[0].shape):
                x.append(line.get("train/run_tokens", line["step"]) + stage.offset)
                loads.append(load * load.shape[1])
    drawn = []
    if loads:
        over_time = np.stack(loads)  # [time, layer, expert], 1 is the even share
        layers = np.unique(np.linspace(0, over_time.shape[1] - 1, _MAX_LAYERS_SHOWN).round().astype(int))
        svg = heat_maps([(f"MoE layer {layer + 1}", over_time[:, layer]) for layer in layers], x, x_label="run tokens")
        drawn.append(page.figure(
            svg, "Share of tokens of an expert times the number of experts: white is even, red more, blue less.", True))
    for name, words in (
        ("balance/max_over_mean", "busiest expert over the mean"), ("balance/worst_violation", "largest MaxVio of a layer"),
        ("balance/dead_experts", "experts without a token for long"), ("balance/bias_max", "largest router bias"),
    ):
        lines = [Curve(stage.name, *stage.on_run_tokens(name), stage.color) for stage in stages if stage.metrics.having(name)]
        if lines:
            drawn.append(page.figure(curves(lines, y_label=words, x_label="run tokens", legend=False), words.capitalize() + "."))
    return [page.figures(drawn)] if drawn else [page.sentence("No expert load was logged.")]


def _samples(folder: RunFolder, stages: list[Stage]) -> list[str]:
    parts = []
    for stage in stages:
        records = read_lines(folder.samples(stage.name)).records
        if records:
            said = [_dialogue(record) for record in records[-_SAMPLES_SHOWN:]]
            parts.append((f"{stage.name}: last {len(said)} of {len(records)}", said))
    return [page.folded(title, *said, opened=index == len(parts) - 1) for index, (title, said) in enumerate(parts)] or [
        page.sentence("No stage has written sample dialogues yet.")]


def _dialogue(record: dict) -> str:
    remarks = [f"{name} {record[name]}" for name in ("step", "task", "reward") if record.get(name) is not None]
    return page.dialogue(str(record.get("prompt", "")), str(record.get("reply", "")), "  ·  ".join(remarks))


def _recipes(stages: list[Stage]) -> list[str]:
    parts = [page.folded(stage.name, page.code(json.dumps(stage.recipe, indent=2, ensure_ascii=False)))
             for stage in stages if stage.recipe]
    return parts or [page.sentence("No resolved recipe is in this folder.")]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
