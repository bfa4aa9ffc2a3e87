"""Which documents repeat others: equal ones by a hash, nearly equal ones by MinHash bands, the first document staying.

Bands are searched on disk, not in an index that grows in memory: the band hashes of all documents are sorted, those that are equal
lie together, and pairs among them count if their signatures agree in the threshold. That is the decision of datasketch's
`MinHashLSH` followed by `MinHash.jaccard`. A task sorts one band, or one part of the hash range of it where documents are many, so
memory is bounded by ``DOCUMENTS_AT_ONCE``, about 40 bytes each; what stays in memory for all is a byte a document and 16 a pair.
"""

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


def _here(readings: Readings, hashes: np.ndarray, given: dict) -> np.ndarray:
    """Numbers of the documents that are alive and whose hash is in this task's part."""
    chosen = readings.alive(given["alive"])
    if given["parts"] > 1:
        chosen &= hashes % np.uint64(given["parts"]) == given["part"]
    return np.flatnonzero(chosen)


def exact_task(given: dict, folder: Path) -> dict:
    """pairs.npy int64[pairs, 2]: (first document, one equal to it)."""
    readings = Readings.of_input(given["readings"])
    hashes = [readings.column("hashes", row) for row in range(2)]
    documents = _here(readings, hashes[0], given)
    low, high = hashes[0][documents], hashes[1][documents]
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
    hashes = readings.column("bands", given["band"])
    documents = _here(readings, hashes, given)
    hashes = hashes[documents]
    order = np.lexsort((documents, hashes))
    candidates = candidate_pairs(documents[order], hashes[order])
    pairs = [
        some[similarity(readings, some) >= deduplicate.threshold]
        for some in np.array_split(candidates, -(-len(candidates) // PAIRS_AT_ONCE) or 1)
    ]
    pairs = np.concatenate(pairs)
    np.save(folder / "pairs.npy", pairs)
    return {"candidates": len(candidates), "pairs": len(pairs)}


def candidate_pairs(documents: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """int64[pairs, 2] of documents in one bucket. ``hashes`` sorted, ``documents`` rising where they are equal."""
    begins = np.ones(len(hashes), bool)
    begins[1:] = hashes[1:] != hashes[:-1]
    first = np.maximum.accumulate(np.where(begins, np.arange(len(hashes)), 0)) if len(hashes) else np.zeros(0, np.int64)
    place = np.arange(len(hashes))
    found = []
    for back in range(1, LOOK_BACK + 1):
        later = np.flatnonzero(place - first >= back)
        if not len(later):
            break
        found.append(np.stack([documents[later - back], documents[later]], axis=1))
    far = np.flatnonzero(place - first > LOOK_BACK)
    found.append(np.stack([documents[first[far]], documents[far]], axis=1))
    return np.concatenate(found)


def similarity(readings: Readings, pairs: np.ndarray) -> np.ndarray:
    """float[pairs]: estimated Jaccard similarity, the share of equal places of the two signatures."""
    one, other = (readings.rows("signatures", pairs[:, side]) for side in range(2))
    return (one == other).mean(axis=1)


def keep_first(alive: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(alive bool[documents] without the later ones of pairs whose earlier one stays, int64[dropped, 2] of (kept, dropped)).

    Read in the order of the documents, as if each came to an index of those kept so far.
    """
    alive = alive.copy()
    dropped = []
    for earlier, later in np.unique(pairs[:, ::-1], axis=0)[:, ::-1].tolist():
        if alive[earlier] and alive[later]:
            alive[later] = False
            dropped.append((earlier, later))
    return alive, np.array(dropped, np.int64).reshape(-1, 2)


def resolve_task(given: dict, folder: Path) -> dict:
    """alive.npy and dropped.npy (kept, dropped) from the pairs of the tasks before."""
    pairs = [np.load(path) for path in given["pairs"]]
    alive, dropped = keep_first(Readings.of_input(given["readings"]).alive(given["alive"]), np.concatenate([np.zeros((0, 2), np.int64), *pairs]))
    return _published(folder, alive, dropped)


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
