"""SemDedup (Abbas et al. 2023): of documents whose embeddings nearly agree only the best scored stays.

Pages made from one template, with other names filled in, score well and share too few words for MinHash. Here an embedding is
made of each document, k-means sorts them into clusters, and within a cluster documents are compared, best score first: one stays
unless it comes closer than the threshold to one that stayed.

An embedder is fitted on a sample and gives unit vectors; the built-in one is a TF-IDF of hashed words and a truncated SVD.
A recipe's ``plugins`` may register others (a sentence encoder, say).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from glm.errors import RecipeError
from glm.recipe.raw import Semantic
from pretrain.reading import Readings
from pretrain.scorers import import_plugins

SAMPLED_TASKS = 64
"""The sample is drawn from so many tasks, spread evenly."""
CHARACTERS = 10_000
"""As many from the start of a document are looked at."""
FEATURES = 2**16
LEAST_SHOWN = 0.5
"""A document of which the directions show less than this length (of 1) is like nothing in the sample, and is like no other."""
COMPARED_AT_ONCE = 2048


class Embedder(Protocol):
    """Fitted once, used in many processes: what it learns are arrays."""

    def fit(self, texts: Sequence[str], dimensions: int, seed: int) -> dict[str, np.ndarray]: ...

    def embed(self, texts: Sequence[str], fitted: dict[str, np.ndarray]) -> np.ndarray:
        """float32[texts, dimensions], each of length 1 (or 0)."""


class TfidfSvd:
    """Words by their rarity, projected on the directions in which the sample varies most."""

    def _counts(self, texts: Sequence[str]):
        from sklearn.feature_extraction.text import HashingVectorizer

        counts = HashingVectorizer(n_features=FEATURES, alternate_sign=False, norm=None).transform([text[:CHARACTERS] for text in texts])
        counts.data = 1 + np.log(counts.data)
        return counts

    def fit(self, texts: Sequence[str], dimensions: int, seed: int) -> dict[str, np.ndarray]:
        from sklearn.preprocessing import normalize
        from sklearn.utils.extmath import randomized_svd

        counts = self._counts(texts)
        rarity = np.log((1 + len(texts)) / (1 + np.bincount(counts.indices, minlength=FEATURES))) + 1
        weighted = normalize(counts.multiply(rarity).tocsr())
        rank = min(dimensions, *(size - 1 for size in weighted.shape))
        _, _, directions = randomized_svd(weighted, max(1, rank), n_iter=3, random_state=seed)
        return {"rarity": rarity.astype(np.float32), "directions": directions.astype(np.float32)}

    def embed(self, texts: Sequence[str], fitted: dict[str, np.ndarray]) -> np.ndarray:
        from sklearn.preprocessing import normalize

        projected = normalize(self._counts(texts).multiply(fitted["rarity"]).tocsr()) @ fitted["directions"].T
        projected[np.linalg.norm(projected, axis=1) < LEAST_SHOWN] = 0
        return normalize(projected).astype(np.float32)


_registered: dict[str, Callable[[], Embedder]] = {"tfidf_svd": TfidfSvd}


def register_embedder(name: str) -> Callable[[Callable[[], Embedder]], Callable[[], Embedder]]:
    """Class decorator: the class, called without arguments, is the embedder ``name``."""

    def enter(make: Callable[[], Embedder]) -> Callable[[], Embedder]:
        _registered[name] = make
        return make

    return enter


def make_embedder(name: str) -> Embedder:
    """Raises RecipeError for a name nobody registered."""
    if name not in _registered:
        known = ", ".join(sorted(_registered))
        raise RecipeError("semantic.embedder", repr(name), f"one of {known}", "correct the name, or name the module that registers it in `plugins`")
    return _registered[name]()


def tasks_of(readings: Readings, semantic: Semantic) -> list[int]:
    """Numbers of the reading tasks whose documents are compared."""
    return [number for number, source in enumerate(readings.sources) if not semantic.sources or source in semantic.sources]


def fit_task(given: dict, folder: Path) -> dict:
    """fitted.npz: what the embedder learned from a sample, and the centres of the clusters."""
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    import_plugins(given["plugins"])
    readings, semantic = Readings.of_input(given["readings"]), Semantic.model_validate(given["semantic"])
    alive = readings.alive(given["alive"])
    tasks = tasks_of(readings, semantic)
    compared = sum(int(alive[readings.firsts[task] : readings.firsts[task + 1]].sum()) for task in tasks)
    texts = _sample(readings, alive, tasks, semantic.sample_documents)
    embedder = make_embedder(semantic.embedder)
    with threadpool_limits(1):    # sums in one order: the same bits on any machine of a kind
        fitted = embedder.fit(texts, semantic.dimensions, given["seed"]) if len(texts) > 1 else {}
        clusters = max(1, min(compared // semantic.documents_per_cluster, len(texts) // 4))
        if clusters > 1:
            model = MiniBatchKMeans(clusters, random_state=given["seed"], n_init=1, batch_size=4096)
            fitted["centres"] = model.fit(embedder.embed(texts, fitted)).cluster_centers_.astype(np.float32)
    np.savez(folder / "fitted.npz", **fitted)
    return {"compared": compared, "sample": len(texts), "clusters": clusters}


def _sample(readings: Readings, alive: np.ndarray, tasks: list[int], size: int) -> list[str]:
    """Texts of at most ``size`` documents: those with the least hashes, from tasks spread evenly."""
    spread = [tasks[len(tasks) * index // SAMPLED_TASKS] for index in range(SAMPLED_TASKS)] if len(tasks) > SAMPLED_TASKS else tasks
    numbers, hashes = [], []
    for task in spread:
        here = np.flatnonzero(alive[readings.firsts[task] : readings.firsts[task + 1]])
        numbers.append(here + readings.firsts[task])
        hashes.append(np.asarray(readings.array(task, "hashes"))[0, here])
    numbers, hashes = np.concatenate([np.zeros(0, np.int64), *numbers]), np.concatenate([np.zeros(0, np.uint64), *hashes])
    chosen = np.sort(numbers[np.argsort(hashes, kind="stable")[:size]])
    texts = readings.some_texts(chosen.tolist())
    return [texts[number][1] for number in chosen.tolist()]


def embed_task(given: dict, folder: Path) -> dict:
    """Of the documents of one reading task that are alive: documents.npy, embeddings.npy float32[n, dimensions], clusters.npy."""
    import_plugins(given["plugins"])
    readings, semantic = Readings.of_input(given["readings"]), Semantic.model_validate(given["semantic"])
    task, embedder = given["task"], make_embedder(semantic.embedder)
    first = int(readings.firsts[task])
    alive = readings.alive(given["alive"])[first : first + readings.counts[task]]
    with np.load(given["fitted"], allow_pickle=False) as stored:
        fitted = dict(stored)
    embeddings, start = [np.zeros((0, 1), np.float32)] if not alive.any() else [], 0
    for batch in readings.texts(task):
        texts = [text for (_, text), stays in zip(batch, alive[start : start + len(batch)]) if stays]
        start += len(batch)
        if texts:
            embeddings.append(embedder.embed(texts, fitted) if fitted else np.zeros((len(texts), 1), np.float32))
    embeddings = np.concatenate(embeddings)
    centres = fitted.get("centres")
    nearest = np.zeros(len(embeddings), np.int32) if centres is None else _nearest(embeddings, centres)
    np.save(folder / "documents.npy", np.flatnonzero(alive) + first)
    np.save(folder / "embeddings.npy", embeddings)
    np.save(folder / "clusters.npy", nearest)
    return {"documents": len(embeddings)}


def _nearest(embeddings: np.ndarray, centres: np.ndarray) -> np.ndarray:
    parts = np.array_split(embeddings, -(-len(embeddings) // COMPARED_AT_ONCE) or 1)
    squares = (centres**2).sum(axis=1)
    return np.concatenate([(squares - 2 * part @ centres.T).argmin(axis=1) for part in parts]).astype(np.int32)


def compare_task(given: dict, folder: Path) -> dict:
    """dropped.npy int64[pairs, 2] of (kept, dropped) in clusters [first, last)."""
    readings = Readings.of_input(given["readings"])
    clusters, documents, embeddings = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)], []
    for path in map(Path, given["embedded"]):
        nearest = np.load(path / "clusters.npy")
        here = np.flatnonzero((nearest >= given["first"]) & (nearest < given["last"]))
        if len(here):
            clusters.append(nearest[here])
            documents.append(np.load(path / "documents.npy")[here])
            embeddings.append(np.load(path / "embeddings.npy", mmap_mode="r")[here])
    clusters, documents = np.concatenate(clusters), np.concatenate(documents)
    embeddings = np.concatenate(embeddings) if embeddings else np.zeros((0, 1), np.float32)
    pairs = [np.zeros((0, 2), np.int64)]
    for cluster in np.unique(clusters):
        here = np.flatnonzero(clusters == cluster)
        pairs.append(drop_close(documents[here], embeddings[here], readings.rows("scores", documents[here]), given["threshold"]))
    dropped = np.concatenate(pairs)
    np.save(folder / "dropped.npy", dropped)
    return {"dropped": len(dropped)}


def drop_close(documents: np.ndarray, embeddings: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """int64[pairs, 2] of (kept, dropped): best score first, of equal scores the earlier document."""
    order = np.lexsort((documents, -scores))
    documents, embeddings = documents[order], embeddings[order]
    kept, pairs = np.zeros(0, np.int64), []
    for start in range(0, len(documents), COMPARED_AT_ONCE):
        block = embeddings[start : start + COMPARED_AT_ONCE]
        stays = np.ones(len(block), bool)
        for before in np.array_split(kept, -(-len(kept) // COMPARED_AT_ONCE) or 1):
            if len(before):
                close = block @ embeddings[before].T >= threshold
                for row in np.flatnonzero(close.any(axis=1) & stays):
                    stays[row] = False
                    pairs.append((documents[before[close[row].argmax()]], documents[start + row]))
        close = block @ block.T >= threshold
        for row in range(len(block)):
            if stays[row]:
                for other in np.flatnonzero(close[row, row + 1 :] & stays[row + 1 :]) + row + 1:
                    stays[other] = False
                    pairs.append((documents[start + row], documents[start + other]))
        kept = np.concatenate([kept, np.flatnonzero(stays) + start])
    return np.array(pairs, np.int64).reshape(-1, 2)
