"""Curves, heat maps and bars as SVG text that takes the colour of the page it stands in.

matplotlib takes half a second to import, so it is imported when the first figure is drawn.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glm.metrics.console import short_count

PALETTE = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#06b6d4", "#ca8a04", "#ec4899", "#64748b", "#84cc16")
_INK = "#010203"  # drawn in this, then replaced: the page decides between dark on light and light on dark
_MAX_POINTS = 500
_NARROW, _WIDE = 5.6, 10.5  # inches, for a figure in half of the page's width and in all of it


@dataclass(frozen=True)
class Curve:
    """One line of a plot. ``kind``: line, dashed, faint (raw values behind a smooth line), steps, dots."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = PALETTE[0]
    kind: str = "line"


_KINDS = {
    "line": {"linewidth": 1.6}, "dashed": {"linewidth": 1.2, "linestyle": (0, (4, 2))},
    "faint": {"linewidth": 0.8, "alpha": 0.35}, "steps": {"linewidth": 1.6, "drawstyle": "steps-post"},
    "dots": {"marker": "o", "markersize": 4, "linewidth": 1.2},
}


def thinned(x: Sequence[float], y: Sequence[float], points: int = _MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``points`` points, each the mean of its neighbours: a page of a million steps stays small."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) <= points:
        return x, y
    parts = np.array_split(np.arange(len(x)), points)
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


def smoothed(y: Sequence[float], window: int) -> np.ndarray:
    """Mean over the last ``window`` values (fewer at the start); values that are not finite are left out."""
    y = np.asarray(y, float)
    good = np.isfinite(y)
    total, count = np.cumsum(np.where(good, y, 0.0)), np.cumsum(good)
    total[window:], count[window:] = total[window:] - total[:-window].copy(), count[window:] - count[:-window].copy()
    return np.divide(total, count, out=np.full(len(y), np.nan), where=count > 0)


def curves(lines: Sequence[Curve], *, y_label: str, x_label: str = "step", log: bool = False, limit: float | None = None,
           legend: bool = True, limit_label: str = "", wide: bool = False) -> str:
    """One plot. ``limit`` draws a dotted horizontal line. ``wide`` suits a figure that takes the whole row of the page."""
    figure, axes = _figure(3.0 if wide else 2.7, width=_WIDE if wide else _NARROW)
    for line in lines:
        x, y = (np.asarray(line.x, float), np.asarray(line.y, float)) if line.kind == "steps" else thinned(line.x, line.y)
        if len(x):
            alone = {"marker": "o", "markersize": 3} if len(x) == 1 else {}
            axes.plot(x, y, color=line.color, label=line.label, **(_KINDS[line.kind] | alone))
    if not log and any(line.kind == "steps" for line in lines):
        axes.set_ylim(bottom=0)
    if limit is not None:
        axes.axhline(limit, color=_INK, alpha=0.6, linewidth=1, linestyle=":", label=limit_label)
    if log:
        axes.set_yscale("log")
    axes.set_ylabel(y_label)
    _finish_x(axes, x_label)
    if y_label.startswith("tokens"):
        axes.yaxis.set_major_formatter(lambda value, _: short_count(value))
    _legend(axes, legend)
    return _svg(figure)


def heat_maps(
    panels: Sequence[tuple[str, np.ndarray]], x: Sequence[float], *, x_label: str, limits: tuple[float, float] = (0, 2), colors: str = "RdBu_r",
) -> str:
    """One panel under the other, each [time, row]. ``x``: the time of each; ``limits``: the values of the first and the last colour,
    by default those of a load over the even share, of which 1 is balanced."""
    figure, all_axes = _figure(0.5 + 0.95 * len(panels), rows=len(panels), width=_WIDE)
    for axes, (label, loads) in zip(np.atleast_1d(all_axes), panels, strict=True):
        parts = np.array_split(np.arange(len(loads)), min(len(loads), 200))
        cells = np.stack([loads[part].mean(0) for part in parts])
        edges = np.array([x[part[0]] for part in parts] + [x[-1]], float)
        edges = np.maximum.accumulate(edges + np.arange(len(edges)) * 1e-9)
        if len(edges) == 2 and edges[0] >= edges[1] - 1e-6:
            edges[1] = edges[0] + 1
        image = axes.pcolormesh(edges, np.arange(cells.shape[1] + 1), cells.T, cmap=colors, vmin=limits[0], vmax=limits[1], rasterized=True)
        axes.set_ylabel(label)
        axes.grid(False)
    _finish_x(np.atleast_1d(all_axes)[-1], x_label)
    bar = figure.colorbar(image, ax=all_axes, pad=0.01, aspect=12 + 6 * len(panels))
    bar.outline.set_visible(False)
    return _svg(figure)


def bars(groups: Sequence[str], series: Sequence[tuple[str, Sequence[float], Sequence[float], str]], *, y_label: str) -> str:
    """Groups of bars; a series is (label, heights, standard errors, colour); a height that is missing is nan."""
    figure, axes = _figure(2.9, width=_WIDE)
    width = 0.8 / max(1, len(series))
    for index, (label, heights, errors, color) in enumerate(series):
        places = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
        axes.bar(places, heights, width * 0.92, color=color, label=label)
        errors = np.nan_to_num(np.asarray(errors, float))
        axes.errorbar(places, heights, yerr=errors, fmt="none", ecolor=_INK, elinewidth=0.9, capsize=1.5)
    axes.set_xticks(np.arange(len(groups)), groups)
    axes.set_ylabel(y_label)
    axes.set_ylim(bottom=0)
    _legend(axes, True)
    return _svg(figure)


def stacked(x: Sequence[float], parts: Sequence[tuple[str, Sequence[float], str]], *, y_label: str, x_label: str = "step") -> str:
    """Areas on top of each other; a part is (label, heights, colour)."""
    figure, axes = _figure(2.7)
    thin = [thinned(x, heights) for _, heights, _ in parts]
    axes.stackplot(thin[0][0], [np.nan_to_num(heights) for _, heights in thin], labels=[label for label, *_ in parts],
                   colors=[color for *_, color in parts], alpha=0.85, linewidth=0)
    axes.set_ylabel(y_label)
    _finish_x(axes, x_label)
    _legend(axes, True)
    return _svg(figure)


def _figure(height: float, rows: int = 1, width: float = _NARROW):
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    pyplot.rcParams.update({
        "svg.fonttype": "none", "font.size": 9, "text.color": _INK, "axes.grid": True, "grid.alpha": 0.14, "grid.color": _INK,
        "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.linewidth": 0.6,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False,
        "legend.fontsize": 8,
    })
    return pyplot.subplots(rows, 1, figsize=(width, height), sharex=True, layout="constrained")


def _finish_x(axes, label: str) -> None:
    axes.set_xlabel(label)
    if "tokens" in label:
        axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
    elif label == "step":
        axes.xaxis.get_major_locator().set_params(integer=True)


def _legend(axes, wanted: bool) -> None:
    handles, labels = axes.get_legend_handles_labels()
    shown = {label: handle for handle, label in zip(handles, labels, strict=True) if label and not label.startswith("_")}
    if wanted and len(shown) > 1:
        axes.legend(shown.values(), shown.keys(), ncols=min(4, len(shown)), loc="lower left", bbox_to_anchor=(0, 1.0),
                    borderaxespad=0.1, handlelength=1.4, columnspacing=1.2)


def _svg(figure) -> str:
    """The figure as an <svg> element without size, prolog or metadata, in the page's text colour and font."""
    from matplotlib import pyplot

    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(out, format="svg", transparent=True, dpi=110, metadata=nothing)
    pyplot.close(figure)
    svg = out.getvalue()
    svg = svg[svg.index("<svg"):].replace(_INK, "currentColor")
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return re.sub(r"(font: [0-9.]+px )[^;\"]*", r"\1system-ui, sans-serif", svg)
