"""The part of the report that tells the loss apart by source and by position, and the time of a step by phase."""

from typing import Iterator

from glm.metrics import page
from glm.metrics.console import short_count
from glm.metrics.figures import PALETTE, Curve, curves, smoothed, stacked
from glm.metrics.stage import Stage

_PHASES = ("data", "forward_backward", "optimizer", "logging", "checkpoint", "validation")


def part_figures(stages: list[Stage]) -> list[str]:
    drawn = [
        (_by_part(stages, "source/loss/", str, "loss"), "Loss of every source of the mixtures."),
        (_by_part(stages, "validation/source/", str, "validation loss", kind="dots"), "Loss of held-out rows, by source."),
        (_by_part(stages, "position/loss/", _position, "loss"), "Loss by how far into its document a token stands: the end of a band."),
        (_phases(stages), "Seconds of a step by phase, mean since the line before. Writing the line and saving count in the step after."),
    ]
    shown = [page.figure(svg, caption, index == 0) for index, (svg, caption) in enumerate(drawn) if svg]
    return [page.figures(shown)] if shown else [page.sentence("No loss by source or position was logged.")]


def _position(end: str) -> str:
    return f"below {short_count(int(end))}"


def _by_part(stages: list[Stage], prefix: str, label, y_label: str, kind: str = "line") -> str:
    """A curve a name under ``prefix``, one colour over all stages."""
    names = sorted({name for stage in stages for name in stage.metrics.names(prefix)}, key=lambda name: (name.isdigit(), len(name), name))
    lines = []
    for index, name in enumerate(names):
        for stage in stages:
            x, y = stage.on_run_tokens(name)
            if x:
                y = smoothed(y, max(1, len(y) // 40)) if kind == "line" else y
                lines.append(Curve(label(name.removeprefix(prefix)), x, y, PALETTE[index % len(PALETTE)], kind))
    return curves(lines, y_label=y_label, x_label="run tokens", wide=prefix == "source/loss/") if lines else ""


def _phases(stages: list[Stage]) -> str:
    """Areas over all stages, one after the other; a phase that a line does not have took no time."""
    x, seconds = [], {phase: [] for phase in _PHASES}
    for stage in stages:
        for line, means in phase_means(stage.metrics.having("phase/forward_backward_seconds")):
            x.append(line.get("train/run_tokens", line["step"]) + stage.offset)
            for phase in _PHASES:
                seconds[phase].append(means[phase])
    areas = [(phase.replace("_", "-"), seconds[phase], PALETTE[index]) for index, phase in enumerate(_PHASES) if any(seconds[phase])]
    return stacked(x, areas, y_label="seconds", x_label="run tokens") if len(x) > 1 else ""


def phase_means(lines: list[dict]) -> Iterator[tuple[dict, dict[str, float]]]:
    """Each line with the seconds of a step by phase, mean over the steps since the line before."""
    before = 0
    for line in lines:
        steps, before = max(1, line["step"] - before), line["step"]
        yield line, {phase: line.get(f"phase/{phase}_seconds", 0.0) / steps for phase in _PHASES}
