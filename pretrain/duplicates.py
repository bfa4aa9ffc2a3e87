"""Which documents repeat others: equal ones by a hash, nearly equal ones by MinHash bands, the first document staying.

Bands are searched on disk, not in an index that grows in memory: the band hashes of all documents are sorted, those that are equal
lie together, and pairs among them count if their signatures agree in the threshold. That is the decision of datasketch's
`MinHashLSH` followed by `MinHash.jaccard`. A task sorts one band, or one part of the hash range of it where documents are many: at
most about ``DOCUMENTS_AT_ONCE``. What is in memory for all documents is a byte each, and when the pairs of all bands are joined
those pairs, each once (docs/data.md has bytes, measured).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from glm.recipe.raw import Deduplicate
from pretrain.reading import Readings

DOCUMENTS_AT_ONCE = 50_000_000
LOOK_BACK = 32
"""In a bucket of one band a document is compared with so many before it, and with the first."""
PAIRS_AT_ONCE = 65_536


def parts_of(documents: int) -> int:
    """Into how many parts the range of hashes is divided."""
    return -(-documents // DOCUMENTS_AT_ONCE) or 1


def _here(readings: Readings, given: dict, column: str, rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(int64[n] numbers, uint64[rows, n] hashes) of the documents that are alive and whose first hash is in this task's part."""
    alive, documents, hashes = readings.alive(given["alive"]), [np.zeros(0, np.int64)], [np.zeros((len(rows), 0), np.uint64)]
    for task, (first, last) in enumerate(zip(readings.firsts[:-1], readings.firsts[1:])):
        found, chosen = np.asarray(readings.array(task, column)[rows]), alive[first:last]
        if given["parts"] > 1:
            chosen = chosen & (found[0] % np.uint64(given["parts"]) == given["part"])
        here = np.flatnonzero(chosen)
        documents.append(here + first)
        hashes.append(found[:, here])
    return np.concatenate(documents), np.concatenate(hashes, axis=1)


def exact_task(given: dict, folder: Path) -> dict:
    """pairs.npy int64[pairs, 2]: (first document, one equal to it)."""
    readings = Readings.of_input(given["readings"])
    documents, (low, high) = _here(readings, given, "hashes", [0, 1])
    order = np.lexsort((documents, high, low))
    documents, low, high = documents[order], low[order], high[order]
    begins = np.ones(len(documents), bool)
    begins[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    first = documents[np.maximum.accumulate(np.where(begins, np.arange(len(documents)), 0))] if len(documents) else documents
    pairs = np.stack([first[~begins], documents[~begins]], axis=1)
    np.save(folder / "pairs.npy", pairs[np.argsort(pairs[:, 1])])
    return {"pairs": len(pairs)}


def near_task(given: dict, folder: Path) -> dict:
    """pairs.npy int64[pairs, 2]: (earlier, later) documents alike, as far as this band proposes them."""
    readings, deduplicate = Readings.of_input(given["readings"]), Deduplicate.model_validate(given["deduplicate"])
    documents, (hashes,) = _here(readings, given, "bands", [given["band"]])
    order = np.lexsort((documents, hashes))
    documents, hashes = documents[order], hashes[order]
    pairs, proposed = [np.zeros((0, 2), np.int64)], 0
    for candidates in candidate_pairs(documents, hashes):
        proposed += len(candidates)
        for some in np.array_split(candidates, -(-len(candidates) // PAIRS_AT_ONCE) or 1):
            pairs.append(some[similarity(readings, some) >= deduplicate.threshold])
    pairs = np.concatenate(pairs)
    np.save(folder / "pairs.npy", pairs)
    return {"candidates": proposed, "pairs": len(pairs)}


def candidate_pairs(documents: np.ndarray, hashes: np.ndarray) -> Iterator[np.ndarray]:
    """int64[pairs, 2], several times, of documents in one bucket. ``hashes`` sorted, ``documents`` rising where they are equal."""
    begins = np.ones(len(hashes), bool)
    begins[1:] = hashes[1:] != hashes[:-1]
    first = np.maximum.accumulate(np.where(begins, np.arange(len(hashes)), 0)) if len(hashes) else np.zeros(0, np.int64)
    behind = np.arange(len(hashes)) - first    # the first of its bucket
    for back in range(1, LOOK_BACK + 1):
        later = np.flatnonzero(behind >= back)
        if not len(later):
            return
        yield np.stack([documents[later - back], documents[later]], axis=1)
    far = np.flatnonzero(behind > LOOK_BACK)
    yield np.stack([documents[first[far]], documents[far]], axis=1)


def similarity(readings: Readings, pairs: np.ndarray) -> np.ndarray:
    """float[pairs]: estimated Jaccard similarity, the share of equal places of the two signatures."""
    one, other = (readings.rows("signatures", pairs[:, side]) for side in range(2))
    return (one == other).mean(axis=1)


def keep_first(alive: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(alive bool[documents] without the later ones of pairs whose earlier one stays, int64[dropped, 2] of (kept, dropped)).

    Read in the order of the documents, as if each came to an index of those kept so far.
    """
    alive, pairs = alive.copy(), distinct(pairs)
    drops = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        for place, (earlier, later) in enumerate(pairs[start : start + PAIRS_AT_ONCE].tolist(), start=start):
            if alive[earlier] and alive[later]:
                alive[later], drops[place] = False, True
    return alive, pairs[drops]


def distinct(pairs: np.ndarray) -> np.ndarray:
    """Each pair once, in the order of the later documents, then of the earlier."""
    pairs = pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]
    new = np.ones(len(pairs), bool)
    new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    return pairs[new]


def resolve_task(given: dict, folder: Path) -> dict:
    """alive.npy and dropped.npy (kept, dropped) from the pairs of the tasks before."""
    pairs = np.zeros((0, 2), np.int64)
    for path in given["pairs"]:    # one after the other: every band proposes the same pairs
        pairs = distinct(np.concatenate([pairs, np.load(path)]))
    return _published(folder, *keep_first(Readings.of_input(given["readings"]).alive(given["alive"]), pairs))


def drop_task(given: dict, folder: Path) -> dict:
    """As ``resolve_task``, from tasks that decided already which documents go."""
    alive = Readings.of_input(given["readings"]).alive(given["alive"])
    dropped = np.concatenate([np.zeros((0, 2), np.int64), *(np.load(path) for path in given["dropped"])])
    alive[dropped[:, 1]] = False
    return _published(folder, alive, dropped)


def _published(folder: Path, alive: np.ndarray, dropped: np.ndarray) -> dict:
    np.save(folder / "alive.npy", alive)
    np.save(folder / "dropped.npy", dropped)
    return {"dropped": len(dropped), "alive": int(alive.sum())}
