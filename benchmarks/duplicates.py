"""Memory of finding duplicates: ``python benchmarks/duplicates.py [DOCUMENTS]`` prints docs/data.md's table, peak bytes a document."""

import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np

from glm.recipe.raw import Deduplicate
from pretrain.duplicates import exact_task, near_task, resolve_task
from pretrain.reading import LIST, Readings, list_task

TASKS = 20
BANDS = 4
PERMUTATIONS = 16
"""Few: the signatures of pairs compared at once do not grow with the documents, and are to weigh little here."""


def made_up(folder: Path, documents: int) -> dict:
    """The input of tasks on random hashes, of which a tenth repeat the document before."""
    drawn, each = np.random.default_rng(0), documents // TASKS
    for task in range(TASKS):
        (folder / f"web-{task}").mkdir()
        chosen = np.arange(each) - (drawn.random(each) < 0.1) * (np.arange(each) > 0)
        for name, array in (
            ("hashes", drawn.integers(0, 2**63, (2, each), np.uint64)[:, chosen]), ("bands", drawn.integers(0, 2**63, (BANDS, each), np.uint64)[:, chosen]),
            ("signatures", drawn.integers(0, 2**32, (each, PERMUTATIONS), np.uint32)[chosen]),
        ):
            np.save(folder / f"web-{task}" / f"{name}.npy", array)
    readings = Readings(folder, tuple(f"web-{task}" for task in range(TASKS)), (each,) * TASKS, ("web",) * TASKS)
    return {"readings": {"file": str(folder / LIST), **list_task(readings.as_json(), folder)}, "alive": None}


def main(arguments: list[str]) -> None:
    documents = int(arguments[0]) if arguments else 2_000_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = made_up(folder, documents)
        near = {"band": 0, "deduplicate": Deduplicate(permutations=PERMUTATIONS).model_dump(mode="json")}
        bands = []
        for band in range(BANDS):
            (folder / f"band-{band}").mkdir()
            near_task(given | near | {"band": band, "part": 0, "parts": 1}, folder / f"band-{band}")
            bands.append(str(folder / f"band-{band}" / "pairs.npy"))
        steps = {f"{name}, 1 of {parts} parts": (work, more | {"part": 0, "parts": parts})
                 for parts in (1, 4) for name, work, more in (("exact", exact_task, {}), ("near, one band", near_task, near))}
        for step, (work, more) in (steps | {"pairs of all bands joined": (resolve_task, {"pairs": bands})}).items():
            tracemalloc.start()
            work(given | more, folder)
            print(f"{step:28} {tracemalloc.get_traced_memory()[1] / documents:8.1f} bytes a document")
            tracemalloc.stop()
        print(f"{len(np.load(bands[0])) / documents:.3f} pairs a document")


if __name__ == "__main__":
    main(sys.argv[1:])
