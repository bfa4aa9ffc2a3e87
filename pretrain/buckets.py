"""Quality buckets: from scores of documents to the bucket each belongs to."""

from pathlib import Path

import numpy as np

from glm.recipe.raw import Quality
from pretrain.reading import Readings

SCORE_BINS = 1000
BELOW = -1
"""Of a document worse than every bucket takes."""


def score_bin(scores: np.ndarray) -> np.ndarray:
    return np.minimum((scores * np.float32(SCORE_BINS)).astype(np.int64), SCORE_BINS - 1)


def edges(quality: Quality | None, histogram: np.ndarray) -> list[tuple[str, int]]:
    """(bucket, the lowest of its score bins), worst bucket first.

    ``histogram``: bytes of the source's documents in each of the equal score bins. By quantile a bucket begins with the first bin
    whose middle byte has its edge's share of all bytes below it; a bin is never divided.
    """
    if quality is None:
        return [("all", 0)]
    found = []
    for name, edge in sorted(quality.buckets.items(), key=lambda entry: entry[1]):
        if quality.by == "score":
            found.append((name, int(np.ceil(np.float32(edge) * SCORE_BINS - 1e-3))))
        else:
            middle = np.cumsum(histogram) - histogram / 2
            found.append((name, int(np.searchsorted(middle, edge * histogram.sum(), side="left"))))
    return found


def bucket_of(scores: np.ndarray, source_edges: list[tuple[str, int]]) -> np.ndarray:
    """int8[documents]: number of the bucket in ``source_edges``, BELOW for none."""
    return (np.searchsorted([first for _, first in source_edges], score_bin(scores), side="right") - 1).astype(np.int8)


def quality_task(given: dict, folder: Path) -> dict:
    """alive.npy bool[documents] without those no bucket takes. Facts: of each source its edges, and bytes in each score bin.

    Edges are set by the documents that are left: a hundred copies of one text do not fill a bucket.
    """
    readings = Readings.of_input(given["readings"])
    alive = readings.alive(given["alive"])
    tasks_of = {source: [task for task, owner in enumerate(readings.sources) if owner == source] for source in given["quality"]}
    facts = {}
    for source, tasks in tasks_of.items():
        histogram = np.zeros(SCORE_BINS, np.int64)
        for task in tasks:
            here = alive[readings.firsts[task] : readings.firsts[task + 1]]
            bins, sizes = score_bin(readings.array(task, "scores")[here]), readings.array(task, "sizes")[here]
            histogram += np.bincount(bins, weights=sizes, minlength=SCORE_BINS).astype(np.int64)
        rules = given["quality"][source]
        found = edges(Quality.model_validate(rules) if rules else None, histogram)
        for task in tasks:
            here = alive[readings.firsts[task] : readings.firsts[task + 1]]
            here &= bucket_of(np.asarray(readings.array(task, "scores")), found) != BELOW
        facts[source] = {"edges": found, "histogram": histogram.tolist()}
    np.save(folder / "alive.npy", alive)
    return facts
