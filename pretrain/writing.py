"""The last pass: documents that stayed become token ids, a shard for each bucket of each piece; fill-in-the-middle on the way.

Control tokens written out in a document are encoded as ordinary text, and counted.
"""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from glm.data.tokenized import Document, read_facts, text_key, write_corpus
from glm.recipe.raw import RawSource
from glm.tokenizer.encode import count_control_strings, text_encoder
from pretrain.buckets import bucket_of
from pretrain.fill_in_the_middle import choose
from pretrain.reading import Counts, Readings

_encoder_of = lru_cache(maxsize=1)(text_encoder)
"""Of this process: built once."""


def write_task(given: dict, folder: Path) -> dict:
    """Writes the shards of one reading task into RUN/data; what was dropped since it was read, and what was written, as facts.

    ``steps``: (reason, file of who is alive after it) in order.
    """
    readings, source = Readings.of_input(given["readings"]), RawSource.model_validate(given["source"])
    task = given["task"]
    here = slice(int(readings.firsts[task]), int(readings.firsts[task + 1]))
    scores = np.asarray(readings.array(task, "scores"))
    buckets = bucket_of(scores, given["edges"])
    reasons = np.full(len(buckets), "", object)
    for reason, path in given["steps"]:
        alive = np.load(path, mmap_mode="r")[here]
        reasons[~alive & (reasons == "")] = reason
    counts, start = Counts(), 0
    names = [name for name, _ in given["edges"]]
    for batch in readings.texts(task):
        for number, (name, text) in enumerate(batch, start=start):
            label = reasons[number] or f"kept in {names[buckets[number]]}"
            counts.add(label, len(text.encode()), name, text, score=round(float(scores[number]), 3))
        start += len(batch)
    written = {}
    for number, name in enumerate(names):
        chosen = (buckets == number) & (reasons == "")
        if chosen.any():
            written[name] = _write_shard(given, name, readings, source, task, chosen)
    return {**counts.as_facts(), "written": written}


def _write_shard(given: dict, bucket: str, readings: Readings, source: RawSource, task: int, chosen: np.ndarray) -> dict:
    done: Counter[str] = Counter()
    shard, data = given["shards"][bucket], Path(given["data"])
    documents = _encoded(given, readings, source, task, chosen, done)
    write_corpus(data, shard, documents, vocab_size=given["vocab_size"], facts={"tokenizer": given["tokenizer_digest"]}, whole=False)
    facts = read_facts(data, shard)
    sizes = np.asarray(readings.array(task, "sizes"))
    return {
        "shard": shard, "documents": facts["documents"], "tokens": facts["tokens"], "bytes": int(sizes[chosen].sum()),
        "rearranged": done["rearranged"], "control_strings": done["control_strings"],
    }


def _encoded(given: dict, readings: Readings, source: RawSource, task: int, chosen: np.ndarray, done: Counter[str]
             ) -> Iterator[Document]:
    """The chosen documents in order; each ends with <|endoftext|>. ``done`` counts on the way."""
    encoder, start = _encoder_of(Path(given["tokenizer"])), 0
    control = {token: np.array([number], np.uint32) for token, number in given["control_ids"].items()}
    end = np.array([encoder.end_of_text], np.uint32)
    for batch in readings.texts(task):
        parts, owners = [], []    # (control token or None, text) of all documents of the batch, and which document it is of
        for number, (name, text) in enumerate(batch, start=start):
            if chosen[number]:
                cut = choose(text, f"{given['name']} {name}", given["seed"], source.fim) if source.fim else None
                done["rearranged"] += cut is not None
                done["control_strings"] += count_control_strings(text)
                parts += cut.parts(text) if cut else [(None, text)]
                owners += [number] * (len(parts) - len(owners))
        ids: dict[int, list[np.ndarray]] = {}
        for owner, (token, _), encoded in zip(owners, parts, encoder.encode([text for _, text in parts]), strict=True):
            ids.setdefault(owner, []).extend([encoded] if token is None else [control[token], encoded])
        for number, document in ids.items():
            # held out by its text, rearranged or not, in every corpus; a problem by its key, as where it is a dialogue
            name, text = batch[number - start]
            key = name if source.corpus == "problems" else text_key(text)
            yield Document(np.concatenate([*document, end]), key=key)
        start += len(batch)
