"""What a worker does with one task: documents of repositories or of records, tokenized, as one shard for each bucket."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from glm.data.tokenized import Document, text_key, write_corpus
from glm.errors import DataError
from glm.recipe.midtrain import AgentCorpus, LongCorpus, ReasoningCorpus, RepositoryCorpus
from glm.tokenizer.chat_template import Segment, encode_segments
from glm.tokenizer.encode import TextEncoder, count_control_strings, text_encoder
from glm.tokenizer.load import load_tokenizer
from midtrain import agent, reasoning
from midtrain.checkout import Checkout, read_files
from midtrain.contexts import Contexts
from midtrain.discussions import read_discussions
from midtrain.document import Draft, joined
from midtrain.long_documents import bucket_of
from midtrain.messages import Unusable
from midtrain.records import KEY, Piece, records
from midtrain.repository import file_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = "3"
"""Raised when the same inputs give other documents."""
RECORDS_AT_ONCE = 64
SAMPLE_TOKENS = 300
SPELLED_OUT = "control tokens spelled out, read as text"
TOO_SHORT = "shorter than every bucket"


class Counts:
    """Of one task: what was read; documents not made, by reason; files, comments and parts of changes left out of documents."""

    def __init__(self):
        self.read, self.dropped, self.left_out = Counter(), Counter(), Counter()
        self.broken: list[str] = []

    def facts(self) -> dict:
        return {key: {reason: count for reason, count in sorted(vars(self)[key].items()) if count} for key in ("read", "dropped", "left_out")} | {
            "broken": len(self.broken), "first_broken": self.broken[:1]}


@dataclass(frozen=True)
class Tokens:
    """The tokenizer of the run: the fast encoder for text, the whole for chats."""

    whole: "PreTrainedTokenizerFast"
    text: TextEncoder

    @property
    def end(self) -> np.ndarray:
        return np.array([self.text.end_of_text], dtype=np.uint32)


@lru_cache(maxsize=1)
def _tokens(folder: Path) -> Tokens:
    """Of a worker process: loaded once."""
    return Tokens(load_tokenizer(folder), text_encoder(folder))


def shard_name(given: dict, bucket: str) -> str:
    inputs = hashlib.blake2b(json.dumps(given, sort_keys=True).encode(), digest_size=8).hexdigest()
    return f"{given['corpus']}-{bucket}-{inputs}"


def do_task(data: Path, tokenizer_folder: Path, given: dict, folder: Path) -> dict:
    """Writes the task's shards into ``data`` and returns its facts; ``folder``, where tasks keep files of their own, stays empty."""
    tokens, counts = _tokens(tokenizer_folder), Counts()
    drafts = _repository_drafts(given, tokens, counts) if given["kind"] == "repositories" else _record_drafts(given, tokens, counts)
    by_bucket: dict[str, list[Document]] = {}
    samples: dict[str, dict] = {}
    for draft in drafts:
        by_bucket.setdefault(draft.bucket, []).append(Document(draft.ids, draft.mask, draft.key))
        if draft.bucket not in samples:
            shown = tokens.whole.decode(draft.ids[:SAMPLE_TOKENS].tolist())
            samples[draft.bucket] = {"label": draft.label, "tokens": len(draft.ids), "text": shown}
    shards = {}
    for bucket, documents in sorted(by_bucket.items()):
        name = shard_name(given, bucket)
        write_corpus(data, name, documents, vocab_size=len(tokens.whole), facts={"tokenizer": given["tokenizer"]}, whole=False)
        shards[bucket] = {"name": name, "documents": len(documents), "tokens": sum(len(document.ids) for document in documents)}
    return {"shards": shards, "samples": samples, **counts.facts()}


def _repository_drafts(given: dict, tokens: Tokens, counts: Counts) -> Iterator[Draft]:
    corpus, encode = RepositoryCorpus(paths=("-",), **given["options"]), tokens.text.encode
    for entry in given["repositories"]:
        checkout = Checkout(*(entry[key] for key in ("name", "path", "git_dir", "commit")))
        files = read_files(checkout, corpus.largest_file_bytes, counts.left_out)
        counts.read["repositories"] += 1
        counts.read["files"] += len(files)
        counts.read[SPELLED_OUT] += sum(map(count_control_strings, files.values()))
        if not files:
            counts.dropped["repository without files worth reading"] += 1
        drafts = file_documents(checkout.name, files, encode, tokens.end, corpus.document_tokens, counts.left_out)
        yield from (_held_out_alike(draft, given) for draft in drafts)
        discussions = read_discussions(Path(entry["discussions"]), counts.left_out) if "discussions" in entry else {}
        counts.read["issues and pull requests"] += len(discussions)
        counts.read["repositories with discussions"] += "discussions" in entry
        if checkout.git_dir and (discussions or corpus.commits):
            contexts = Contexts(checkout, discussions, encode, tokens.end, corpus.document_tokens, counts.dropped, counts.left_out)
            yield from (_held_out_alike(draft, given) for draft in contexts.documents(corpus.commits))


def _held_out_alike(draft: Draft, given: dict) -> Draft:
    return draft if given["hold_out_whole"] else replace(draft, key=draft.label)


def _record_drafts(given: dict, tokens: Tokens, counts: Counts) -> Iterator[Draft]:
    kind = {"reasoning": ReasoningCorpus, "agents": AgentCorpus, "long_documents": LongCorpus}[given["kind"]]
    corpus = kind(paths=("-",), **given["options"])
    found = _usable(given, corpus, counts)
    while batch := list(islice(found, RECORDS_AT_ONCE)):
        encoded = _encoded([segments for _, segments, _ in batch], tokens)
        for (where, segments, key), (ids, mask) in zip(batch, encoded, strict=True):
            counts.read[SPELLED_OUT] += sum(count_control_strings(segment.text) for segment in segments if not segment.control)
            if isinstance(corpus, LongCorpus):
                bucket, why_not = bucket_of(len(ids), corpus.buckets), TOO_SHORT
            else:
                bucket, why_not = "all" if len(ids) <= corpus.document_tokens else None, "longer than a document"
            if bucket is None:
                counts.dropped[why_not] += 1
            else:
                yield Draft(bucket, where, ids, key, mask)


def _encoded(batch: list[list[Segment]], tokens: Tokens) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """(ids, mask) of chats; plain text has no mask and ends with <|endoftext|>."""
    if all(len(segments) == 1 for segments in batch):
        return [(joined([ids, tokens.end]), None) for ids in tokens.text.encode([segments[0].text for segments in batch])]
    return [
        (np.array(ids, dtype=np.uint32), np.array(mask, dtype=np.uint8)) for ids, mask in encode_segments(tokens.whole, batch)
    ]


def _usable(given: dict, corpus, counts: Counts) -> Iterator[tuple[str, list[Segment], str]]:
    """(where, segments, key) of the records that can be trained on."""
    text_field = corpus.text_field if isinstance(corpus, LongCorpus) else "text"
    for where, record in records(Piece(**given["piece"]), text_field, given["seed"]):
        counts.read["records"] += 1
        if isinstance(record, DataError):
            counts.broken.append(str(record))
            continue
        try:
            if isinstance(corpus, LongCorpus):
                segments, about = _long(record, corpus)
            elif isinstance(corpus, ReasoningCorpus):
                segments, about = reasoning.segments_of(record, corpus)
            else:
                segments, about = agent.segments_of(record)
            yield where, segments, record.get(KEY) or text_key(about)
        except Unusable as reason:
            counts.dropped[str(reason)] += 1


def _long(record: dict, corpus: LongCorpus) -> tuple[list[Segment], str]:
    text = record.get(corpus.text_field)
    if not isinstance(text, str):
        raise Unusable(f"no text under {corpus.text_field!r}")
    if len(text.encode()) < min(corpus.buckets.values()) - 1:    # a token has at least a byte
        raise Unusable(TOO_SHORT)
    return [Segment(text)], text
