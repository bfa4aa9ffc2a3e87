"""Tokenizes what a stage's mixture reads into RUN/data, once: a corpus that is there and whole is not made again.

A corpus is named by what decides its contents (tokenizer, documents, problems, seed), so stages share it, and a changed
input makes a new one beside the old. RUN/data/STAGE.json says which one each source of the stage reads, report.json how
many documents and tokens they have.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from glm.checkpoint.run_folder import RunFolder, write_json
from glm.data.batches import Batches, manifest_path
from glm.data.documents import TEXT_CORPORA, corpus_fingerprint, dialogues, documents
from glm.data.encoding import encode_stream
from glm.data.prepared import prepared_corpus
from glm.data.tokenized import Document, fingerprint, read_facts, text_key, write_corpus
from glm.data.verified import verify
from glm.errors import DataError
from glm.recipe.mixture import mixture_of
from glm.recipe.schema import TrainRecipe
from glm.recipe.sections import Data
from glm.tokenizer.chat_template import encode_segments, render
from glm.tokenizer.encode import TextEncoder, text_encoder
from glm.tokenizer.load import digest_of, load_tokenizer, token_id
from glm.tokenizer.special_tokens import END_OF_TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = "4"
"""Raised when the same inputs give other tokens, or other ones held out."""
DOCUMENTS_AT_ONCE = 256


def prepare(recipe: TrainRecipe, folder: RunFolder) -> None:
    """For rank 0 alone; others wait. Raises DataError for text that cannot be read or a torn corpus."""
    tokenizer = load_tokenizer(folder.tokenizer)
    tokenizer_digest = digest_of(folder.tokenizer)
    names, facts = {}, {}
    for source_name, source in mixture_of(recipe.data).sources.items():
        if source.is_prepared:
            asked_by = f"source {source_name} of mixture {recipe.data.mixture}"
            name = prepared_corpus(folder, source.corpus, asked_by=asked_by).corpus
        else:
            name = corpus_name(source.corpus, recipe.data, recipe.seed, tokenizer_digest)
        names[source_name] = name
        verify(folder.data, name)
        facts[source_name] = read_facts(folder.data, name)
        if source.is_prepared:
            _require_prepared(facts[source_name], folder, name, tokenizer_digest)
        elif facts[source_name] is None:
            _tokenize(source.corpus, recipe.data, recipe.seed, tokenizer, folder, name)
            facts[source_name] = read_facts(folder.data, name)
    manifest = {
        "sources": names, "fingerprints": {source: fingerprint(folder.data, found) for source, found in facts.items()},
        "end_of_text": token_id(tokenizer, END_OF_TEXT),
    }
    _require_same_data(recipe, folder, manifest)
    write_json(manifest_path(folder, recipe.stage), manifest)
    _report(recipe, folder, facts)


def _require_prepared(facts: dict | None, folder: RunFolder, name: str, tokenizer_digest: str) -> None:
    """A prepared corpus must be there, made with the tokenizer of the run as far as it says."""
    where, todo = str(folder.data / f"{name}.json"), "run its prepare stage again"
    if facts is None:
        raise DataError(where, "no such file", f"a prepared corpus, as {folder.prepared} says", todo)
    if facts.get("tokenizer", tokenizer_digest) != tokenizer_digest:
        raise DataError(where, f"written with tokenizer {facts['tokenizer']}", f"the tokenizer of the run, {tokenizer_digest}", todo)


def _require_same_data(recipe: TrainRecipe, folder: RunFolder, manifest: dict) -> None:
    """A stage that has trained goes on with the documents it began with, or not at all."""
    path = manifest_path(folder, recipe.stage)
    if not path.exists() or not any(folder.checkpoints(recipe.stage).glob("step_*")):
        return
    began_with = {"fingerprints": manifest["fingerprints"], **json.loads(path.read_text(encoding="utf-8"))}  # older ones have names only
    if began_with != manifest:
        changed = [
            name for name in manifest["sources"]
            if any(began_with[told].get(name) != manifest[told][name] for told in ("sources", "fingerprints"))
        ]
        raise DataError(
            f"documents of stage {recipe.stage}", f"other text than the stage began with: {', '.join(changed) or 'the tokenizer'}",
            "the documents of its checkpoints", f"restore them, use another run_folder, or remove {folder.stage(recipe.stage)}",
        )


def corpus_name(corpus: str, data: Data, seed: int, tokenizer_digest: str) -> str:
    """File name of a tokenized corpus. The user's own text stands for three corpora and is tokenized once."""
    kind = "documents" if data.documents is not None and corpus in TEXT_CORPORA else corpus
    inputs = [FORMAT, tokenizer_digest, corpus_fingerprint(kind, data.documents, data.problems, seed)]
    return f"{kind}-{hashlib.blake2b(json.dumps(inputs).encode(), digest_size=6).hexdigest()}"


def _tokenize(corpus: str, data: Data, seed: int, tokenizer: "PreTrainedTokenizerFast", folder: RunFolder, name: str) -> None:
    counts: Counter[str] = Counter()
    if corpus == "dialogues":
        encoded = _encoded_dialogues(data, seed, tokenizer)
    else:
        encoded = _encoded_texts(corpus, data, seed, text_encoder(folder.tokenizer), counts)
    total = data.problems if corpus in ("dialogues", "problems") else None
    progress = tqdm(encoded, desc=f"tokenize {name.split('-')[0]}", total=total, unit="doc", disable=None, leave=False)
    facts = {"corpus": corpus, "tokenizer": digest_of(folder.tokenizer)}
    write_corpus(folder.data, name, progress, vocab_size=len(tokenizer), facts=facts, counted=lambda: {
        "dropped": {reason: counts[reason] for reason in ("empty", "repeated")}, "control_strings": counts["control_strings"],
    })


def _in_batches(items: Iterable) -> Iterator[list]:
    items = iter(items)
    while batch := list(islice(items, DOCUMENTS_AT_ONCE)):
        yield batch


def _encoded_texts(corpus: str, data: Data, seed: int, encoder: TextEncoder, counts: Counter[str]) -> Iterator[Document]:
    """Each text ends with <|endoftext|>. Empty texts and exact repetitions are dropped and counted; problems may repeat."""
    texts = documents(corpus, data.documents, data.problems, seed)
    for encoded in encode_stream(texts if corpus == "problems" else _kept(texts, counts), encoder):
        counts["control_strings"] += encoded.control_strings
        yield Document(encoded.ids, key=encoded.key)


def _kept(texts: Iterable[tuple[str, str]], counts: Counter[str]) -> Iterator[tuple[str, str]]:
    """(key, text)"""
    seen: set[bytes] = set()
    for _, text in texts:
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if not text.strip():
            counts["empty"] += 1
        elif digest in seen:
            counts["repeated"] += 1
        else:
            seen.add(digest)
            yield text_key(text), text


def _encoded_dialogues(data: Data, seed: int, tokenizer: "PreTrainedTokenizerFast") -> Iterator[Document]:
    for batch in _in_batches(dialogues(data.problems, seed)):
        segments = [render(messages, enable_thinking=thinks, close=True) for _, messages, thinks in batch]
        for (key, _, _), (ids, mask) in zip(batch, encode_segments(tokenizer, segments), strict=True):
            yield Document(ids, mask, key)


def _report(recipe: TrainRecipe, folder: RunFolder, facts: dict[str, dict]) -> None:
    """Adds the stage to RUN/data/report.json and prints a line for each source."""
    path = folder.data / "report.json"
    stages = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    lines = Batches(recipe, folder).report()
    for name, line in lines.items():
        line["dropped"] = facts[name].get("dropped", {})
        line["control_strings"] = facts[name].get("control_strings", 0)
        print(
            f"{recipe.stage}: {name} {line['documents']:,} documents, {line['tokens']:,} tokens, {line['epochs']:.2f} epochs"
            + (f" ({line['corpus_epochs']:.2f} with the others that read it)" if line["corpus_epochs"] > line["epochs"] else "")
            + "".join(f", {count} {reason} dropped" for reason, count in line["dropped"].items() if count)
            + (f", {line['control_strings']} control tokens spelled out, read as text" if line["control_strings"] else ""), flush=True,
        )
    write_json(path, {**stages, recipe.stage: lines})
