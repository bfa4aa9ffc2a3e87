"""The reinforcement-learning part of the report: held-out accuracy first, then what the loop did."""

import math
from dataclasses import replace

from glm.metrics import page
from glm.metrics.figures import PALETTE, Curve, bars, curves, smoothed, stacked
from glm.metrics.read import StageMetrics, as_number

_BLUE, _ORANGE, _GREEN, _VIOLET = PALETTE[:4]
_PALE = {"sampled": "#93c5fd", "greedy": "#fdba74"}
_FULL = {"sampled": _BLUE, "greedy": _ORANGE}
_REWARD_WINDOW = 10


def rl_parts(stages: list[tuple[str, StageMetrics, dict]]) -> list[str]:
    """Markup for every stage that logged ``rl/`` or ``eval/`` metrics; ``stages``: (name, metrics, resolved recipe)."""
    parts = []
    for name, metrics, recipe in stages:
        if metrics.names("rl/") or metrics.names("eval/"):
            parts += [page.heading(name), *_accuracy(metrics), *_loop(metrics, recipe)]
    return parts or [page.sentence("No stage with rewards has logged a step yet.")]


def _accuracy(metrics: StageMetrics) -> list[str]:
    """Tables and bars of the held-out problems, before and after."""
    # Of two lines of a phase the later counts: a resumed stage measures again.
    lines = {line["eval/phase"]: line for line in metrics.having("eval/phase")}
    before, after = lines.get("before", {}), lines.get("after", {})
    if not before:
        return [page.sentence("Held-out accuracy was not measured before this stage.")]
    missing = [] if after else [page.sentence("The stage has not reached its evaluation at the end yet.")]
    rows = []
    for kind in ("sampled", "greedy"):
        first, last = (_measured(line, f"eval/{kind}_accuracy", f"eval/{kind}_standard_error") for line in (before, after))
        rows.append((kind, _percent(*first), _percent(*last), _difference(first, last)))
    names = [name for line in (before, after) for name in line if name.startswith("eval/") and name.count("/") == 2]
    tasks = sorted({name.split("/")[1] for name in names})
    per_task = []
    for task in tasks:
        row: list[str] = [task]
        for kind in ("sampled", "greedy"):
            name = f"eval/{task}/{kind}"
            row += [_percent(*_measured(line, name, f"{name}_standard_error")) for line in (before, after)]
        per_task.append(row)
    parts = [page.table(("all held-out problems", "before", "after", "difference"), rows), *missing,
             page.sentence("± one standard error; that of a difference takes the two measurements as independent.")]
    if tasks:
        parts += [page.table(("task", "sampled before", "sampled after", "greedy before", "greedy after"), per_task),
                  page.figures([_bars(tasks, before, after)])]
    during = [line for line in metrics.lines if line.get("eval/phase") == "during"]
    if during:
        everything = StageMetrics(metrics.stage, [line for line in (before, *during, after) if line])
        drawn = [Curve(kind, *everything.series(f"eval/{kind}_accuracy"), color, "dots") for kind, color in _FULL.items()]
        svg = curves(drawn, y_label="held-out accuracy")
        parts.append(page.figures([page.figure(svg, "Held-out accuracy along the way.")]))
    return parts


def _bars(tasks: list[str], before: dict, after: dict) -> str:
    groups = [("all", "eval/{kind}_accuracy", "eval/{kind}_standard_error")]
    groups += [(task, f"eval/{task}/{{kind}}", f"eval/{task}/{{kind}}_standard_error") for task in tasks]
    series = []
    for kind in ("sampled", "greedy"):
        for phase, line, colors in (("before", before, _PALE), ("after", after, _FULL)):
            if line:
                pairs = [_measured(line, value.format(kind=kind), error.format(kind=kind)) for _, value, error in groups]
                heights, errors = ([math.nan if number is None else 100 * number for number in column]
                                   for column in zip(*pairs, strict=True))
                series.append((f"{kind} {phase}", heights, errors, colors[kind]))
    svg = bars([label for label, *_ in groups], series, y_label="held-out accuracy, %")
    return page.figure(svg, "Held-out problems, never in any training text; bars of one standard error.", True)


def _loop(metrics: StageMetrics, recipe: dict) -> list[str]:
    """Curves over the steps of the loop."""
    if not metrics.names("rl/"):
        return []
    steps, reward = metrics.series("rl/reward")
    drawn = []
    if steps:
        smooth = Curve(f"mean of {_REWARD_WINDOW}", steps, smoothed(reward, _REWARD_WINDOW))
        svg = curves([Curve("a step", steps, reward, _BLUE, "faint"), smooth], y_label="reward")
        drawn.append((svg, "Mean reward of the rollouts."))
    tasks = metrics.names("rl/reward/")
    if tasks:
        lines = []
        for index, name in enumerate(tasks):
            x, y = metrics.series(name)
            lines.append(Curve(name.removeprefix("rl/reward/"), x, smoothed(y, _REWARD_WINDOW), PALETTE[index % len(PALETTE)]))
        drawn.append((curves(lines, y_label="reward"), f"Reward by task, mean of {_REWARD_WINDOW} steps."))
    limit = as_number((recipe.get("rl") or {}).get("max_logprob_difference"))
    drawn += [
        (_plot(metrics, "tokens of a reply", ("rl/response_tokens", "", _BLUE)), "Mean length of a reply."),
        (_plot(metrics, "tokens a round", ("rl/acceptance_length", "", _GREEN)),
         "Acceptance length of speculative decoding: tokens kept in a verification round. It falls when drafts go stale."),
        (_plot(metrics, "difference", ("rl/logprob_difference_mean", "mean", _BLUE),
               ("rl/logprob_difference_max", "largest", _ORANGE), log=True, limit=limit, limit_label="limit of the mean"),
         "Absolute difference of a token's logprob between engine and trainer."),
        (_plot(metrics, "entropy", ("rl/entropy", "", _VIOLET)), "Entropy of the policy per token."),
        (_plot(metrics, "gradient norm", ("rl/grad_norm", "", _BLUE)), "Gradient norm before clipping."),
        (_plot(metrics, "MTP loss", ("rl/mtp_loss", "", _GREEN)), "Loss of the MTP head on the rollouts."),
        (_plot(metrics, "groups", ("rl/groups", "groups", _BLUE), ("rl/groups_dropped", "dropped", _ORANGE)),
         "Groups of replies in a step, and those dropped because all their rewards are alike."),
        (_plot(metrics, "tokens a second", ("rl/rollout_tokens_per_second", "", _BLUE)), "Tokens the engine generates a second."),
        (_phases(metrics), "Seconds of a step by phase."),
    ]
    return [page.figures([page.figure(svg, caption) for svg, caption in drawn if svg])]


def _plot(metrics: StageMetrics, y_label: str, *wanted: tuple[str, str, str], **options) -> str:
    """Curves of the metrics (name, label, colour) that were logged; empty when none was."""
    lines = [Curve(label, *metrics.series(name), color) for name, label, color in wanted if metrics.having(name)]
    if options.get("log"):  # zero has no place on a logarithmic axis
        lines = [replace(line, y=[value if value > 0 else math.nan for value in line.y]) for line in lines]
    return curves(lines, y_label=y_label, **options) if lines else ""


def _phases(metrics: StageMetrics) -> str:
    names = [("rl/rollout_seconds", "rollout", _BLUE), ("rl/train_seconds", "train", _ORANGE),
             ("rl/sync_seconds", "weight sync", _GREEN)]
    whole = StageMetrics(metrics.stage, [line for line in metrics.lines if all(name in line for name, *_ in names)])
    if not whole.lines:
        return ""
    areas = [(label, whole.series(name)[1], color) for name, label, color in names]
    return stacked(whole.series("rl/rollout_seconds")[0], areas, y_label="seconds")


def _measured(line: dict, name: str, error_name: str) -> tuple[float | None, float | None]:
    return as_number(line.get(name)), as_number(line.get(error_name))


def _percent(accuracy: float | None, error: float | None) -> str:
    if accuracy is None:
        return "–"
    return f"{100 * accuracy:.1f}%" + (f" ± {100 * error:.1f}" if error is not None else "")


def _difference(first: tuple[float | None, float | None], last: tuple[float | None, float | None]) -> str:
    """Points gained, with the standard error of the difference of two independent measurements."""
    if first[0] is None or last[0] is None:
        return "–"
    points = f"{100 * (last[0] - first[0]):+.1f} points"
    return points if first[1] is None or last[1] is None else f"{points} ± {100 * math.hypot(first[1], last[1]):.1f}"
