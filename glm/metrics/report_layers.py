"""The part of the report with a row for every layer: balance, attention logits, gradients, updates."""

import math

import numpy as np

from glm.metrics import page
from glm.metrics.figures import heat_maps
from glm.metrics.read import as_number
from glm.metrics.stage import Stage

_MAPS = (  # metric, what a row is, caption, colours
    ("balance/max_violation", "layer with experts", "MaxVio: load of the busiest expert over the mean, less one; 0 is balanced.", "Reds"),
    ("attention/max_logit", "layer", "Largest attention logit before softmax, of sampled queries.", "viridis"),
    ("grad/by_layer", "layer", "Norm of the gradient of a layer, before clipping.", "viridis"),
    ("update/by_layer/attention", "layer", "RMS of the update of attention's matrices over the learning rate.", "viridis"),
    ("update/by_layer/experts", "layer", "RMS of the update of the experts over the learning rate.", "viridis"),
)


def layer_figures(stages: list[Stage]) -> list[str]:
    """Maps of layers over run tokens, for every metric of _MAPS that was logged; the MTP layer is on top."""
    drawn = []
    for name, rows, caption, colors in _MAPS:
        x, values = over_time(stages, name)
        if x:
            limits = (0.0 if np.nanmin(values) >= 0 else float(np.nanmin(values)), float(np.nanpercentile(values, 99)) or 1.0)
            svg = heat_maps([(rows, values)], x, x_label="run tokens", limits=limits, colors=colors)
            drawn.append(page.figure(svg, caption, True))
    return [page.figures(drawn)] if drawn else [page.sentence("No metric of layers was logged.")]


def over_time(stages: list[Stage], name: str) -> tuple[list[float], np.ndarray]:
    """(run tokens, [time, layer]) of a metric that is a list with an entry a layer; nan where a layer has none.

    Lines of another number of layers than the first ones' are left out.
    """
    x, rows = [], []
    for stage in stages:
        for line in stage.metrics.having(name):
            values = [math.nan if value is None else as_number(value) for value in line[name]]
            if values and None not in values and (not rows or len(values) == len(rows[0])):
                x.append(line.get("train/run_tokens", line["step"]) + stage.offset)
                rows.append(values)
    values = np.asarray(rows, float)
    return (x, values) if np.isfinite(values).any() else ([], values)
