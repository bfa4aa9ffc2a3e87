"""The first pass over raw sources: read, clean, language, score, signatures. One task reads one piece (``pretrain.readers``).

A task leaves, for the documents it kept, in their order: documents.parquet (name, text), hashes.npy uint64[2, n], scores.npy
float32[n], sizes.npy int64[n] bytes, and for near-duplicates signatures.npy uint32[n, permutations] and bands.npy uint64[bands, n].
What later steps need to know of all documents is read from these, memory-mapped and a task at a time.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from glm.checkpoint.run_folder import write_json
from glm.errors import DataError
from glm.recipe.raw import Deduplicate, RawSource
from pretrain.clean import clean
from pretrain.language import identify
from pretrain.readers import Piece, read
from pretrain.scorers import import_plugins, make_scorer
from pretrain.signatures import band_hashes, bands_and_rows, text_signature

BATCH = 256
LIST = "readings.json"
SAMPLES = 4
"""Documents kept to look at, for each reason and task."""
SAMPLE_CHARACTERS = 400


@dataclass
class Counts:
    """Documents and bytes, and a few to look at, by reason."""

    documents: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    bytes: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    samples: defaultdict[str, list] = field(default_factory=lambda: defaultdict(list))

    def add(self, reason: str, size: int, name: str, text: str, **more: object) -> None:
        self.documents[reason] += 1
        self.bytes[reason] += size
        if len(self.samples[reason]) < SAMPLES:
            self.samples[reason].append({"name": name, "text": text[:SAMPLE_CHARACTERS], **more})

    def as_facts(self) -> dict:
        return {"documents": dict(self.documents), "bytes": dict(self.bytes), "samples": dict(self.samples)}


def read_task(given: dict, folder: Path) -> dict:
    """The facts of a piece: counts of what was read and dropped. Raises DataError."""
    import pyarrow
    import pyarrow.parquet

    import_plugins(given["plugins"])
    source, deduplicate = RawSource.model_validate(given["source"]), Deduplicate.model_validate(given["deduplicate"])
    scorer = make_scorer(source.quality) if source.quality else None
    counts, columns = Counts(), defaultdict(list)
    records = _usable(given, source, counts)
    schema = pyarrow.schema([("name", pyarrow.string()), ("text", pyarrow.large_string())])
    with pyarrow.parquet.ParquetWriter(folder / "documents.parquet", schema, compression="zstd", compression_level=1) as out:
        while batch := list(islice(records, BATCH)):
            names, texts = [name for name, _ in batch], [text for _, text in batch]
            out.write_batch(pyarrow.record_batch([names, pyarrow.array(texts, pyarrow.large_string())], schema=schema))
            sizes = np.array([len(text.encode()) for text in texts], np.int64)
            scores = np.clip(np.asarray(scorer(texts), np.float32), 0, 1) if scorer else np.ones(len(texts), np.float32)
            if np.isnan(scores).any() or len(scores) != len(texts):
                raise DataError(f"scorer {source.quality.scorer}", "not a number for every document", "scores of 0 to 1", "correct the scorer")
            columns["scores"].append(scores)
            columns["sizes"].append(sizes)
            for text in texts:
                exact, near = text_signature(text, deduplicate)
                columns["hashes"].append(exact)
                columns["signatures"].append(near)
    documents = sum(map(len, columns["scores"]))
    _save(folder, columns, deduplicate)
    return {"kept": documents, **counts.as_facts()}


def _save(folder: Path, columns: dict[str, list], deduplicate: Deduplicate) -> None:
    empty = not columns["scores"]
    np.save(folder / "scores.npy", np.zeros(0, np.float32) if empty else np.concatenate(columns["scores"]))
    np.save(folder / "sizes.npy", np.zeros(0, np.int64) if empty else np.concatenate(columns["sizes"]))
    np.save(folder / "hashes.npy", np.zeros((2, 0), np.uint64) if empty else np.stack(columns["hashes"], axis=1))
    if deduplicate.near:
        signatures = np.zeros((0, deduplicate.permutations), np.uint32) if empty else np.stack(columns["signatures"])
        np.save(folder / "signatures.npy", signatures)
        np.save(folder / "bands.npy", band_hashes(signatures, *bands_and_rows(deduplicate)))


def _usable(given: dict, source: RawSource, counts: Counts) -> Iterator[tuple[str, str]]:
    """(name, clean text) of the documents that stay; the others are counted."""
    for name, text in read(Piece.of_input(given["piece"]), source):
        if isinstance(text, DataError):
            counts.add("broken", 0, name, f"{text.where}: {text.found}")
            if counts.documents["broken"] > given["broken_limit"]:
                raise too_many_broken(text, given["broken_limit"])
            continue
        size = len(text.encode())
        counts.documents["read"] += 1
        counts.bytes["read"] += size
        text = clean(text)
        if not text:
            counts.add("empty", size, name, text)
        elif len(text) < given["shortest_characters"]:
            counts.add("short", size, name, text)
        elif source.language and (told := _other_language(text, source)):
            counts.add("language", size, name, text, language=told)
        else:
            yield name, text


def _other_language(text: str, source: RawSource) -> str | None:
    """Why its language drops a text; None: it stays."""
    code, probability = identify(text, source.language.among)
    stays = code in source.language.keep and probability >= source.language.least_probability
    return None if stays else f"{code} {probability:.2f}"


def too_many_broken(last: DataError, limit: int) -> DataError:
    todo = f"{last.todo}, or raise broken_limit ({limit} records of a source)"
    return DataError(last.where, f"{last.found}; more than {limit} such records in this source", last.expected, todo)


def list_task(given: dict, folder: Path) -> dict:
    """readings.json, which tasks are given by name: there are as many of them as it has entries."""
    write_json(folder / LIST, given)
    return {"digest": hashlib.blake2b(json.dumps(given).encode(), digest_size=8).hexdigest()}


@lru_cache(maxsize=1)
def _listed(file: str, digest: str) -> "Readings":
    """Of this process: read once."""
    found = json.loads(Path(file).read_text(encoding="utf-8"))
    return Readings(Path(found["folder"]), tuple(found["names"]), tuple(found["counts"]), tuple(found["sources"]))


@dataclass(frozen=True)
class Readings:
    """The results of all reading tasks, documents numbered through them in reading order."""

    folder: Path
    names: tuple[str, ...]
    """Tasks."""
    counts: tuple[int, ...]
    """Documents of each."""
    sources: tuple[str, ...]
    """Source of each."""

    @cached_property
    def firsts(self) -> np.ndarray:
        """int64[tasks + 1]"""
        return np.cumsum([0, *self.counts], dtype=np.int64)

    @property
    def documents(self) -> int:
        return int(self.firsts[-1])

    def as_json(self) -> dict:
        return {"folder": str(self.folder), "names": list(self.names), "counts": list(self.counts), "sources": list(self.sources)}

    @classmethod
    def of_input(cls, given: dict) -> "Readings":
        """``given``: file and digest, as ``list_task`` left them."""
        return _listed(given["file"], given["digest"])

    def array(self, task: int, column: str) -> np.ndarray:
        return np.load(self.folder / self.names[task] / f"{column}.npy", mmap_mode="r" if self.counts[task] else None)

    def alive(self, path: str | None) -> np.ndarray:
        """bool[documents] of an alive.npy; without one all are."""
        return np.ones(self.documents, bool) if path is None else np.load(path)

    def rows(self, column: str, documents: np.ndarray) -> np.ndarray:
        """Rows of an array kept by document, such as signatures, of the documents asked for."""
        tasks = np.searchsorted(self.firsts, documents, side="right") - 1
        first = self.array(0, column)
        found = np.empty((len(documents), *first.shape[1:]), first.dtype)
        for task in np.unique(tasks).tolist():
            here = tasks == task
            found[here] = self.array(task, column)[documents[here] - self.firsts[task]]
        return found

    def texts(self, task: int) -> Iterator[list[tuple[str, str]]]:
        """The (name, text) documents of one task, in batches."""
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.folder / self.names[task] / "documents.parquet") as table:
            for batch in table.iter_batches(batch_size=BATCH):
                yield list(zip(batch.column(0).to_pylist(), batch.column(1).to_pylist()))

    def some_texts(self, documents: list[int]) -> dict[int, tuple[str, str]]:
        """The (name, text) of a few documents."""
        found = {}
        for task in sorted({int(np.searchsorted(self.firsts, document, side="right")) - 1 for document in documents}):
            first = int(self.firsts[task])
            wanted = {document for document in documents if first <= document < self.firsts[task + 1]}
            for batch in self.texts(task):
                for number, entry in enumerate(batch, start=first):
                    if number in wanted:
                        found[number] = entry
                first += len(batch)
        return found
