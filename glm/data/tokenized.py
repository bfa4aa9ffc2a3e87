"""A corpus as token ids on disk: shards of NAME.bin (ids), NAME.idx (documents), NAME.mask (dialogues only) and NAME.json, written last.

.bin   ids of all documents one after another, uint16 or uint32
.idx   int64[documents + 1] offsets into .bin, then uint8[documents], 1 where a document is held out for validation
.mask  uint8 a token, 1 where the assistant writes
.json  sizes and digests of the others, counts; a corpus without it does not exist, one that contradicts it is torn

A corpus of many shards is a NAME.json alone that lists them in order, with the documents and tokens of each; documents are
numbered through all of them. Files are mapped when they are read, so that a corpus may have any number of shards.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from glm.checkpoint.run_folder import write_json
from glm.errors import DataError

HELD_OUT_MODULUS = 50
"""One document in this many is for validation."""
OPEN_FILES = 256
"""Mapped at once by a process, over all its corpora: each holds a file descriptor, of which it may have no more than 1024."""


@dataclass(frozen=True)
class Document:
    """Tokens, and for a dialogue the mask of what the assistant writes. Documents of one ``key`` are held out together, in
    every corpus: a problem met in one is not validated with in another. Without a key, equal tokens are."""

    ids: Sequence[int] | np.ndarray
    mask: list[int] | None = None
    key: str | None = None


def text_key(text: str) -> str:
    """The key of a document that is this text or about it, in whatever corpus, tokenizer, arrangement or white space."""
    return f"text {hashlib.blake2b(' '.join(text.split()).encode(), digest_size=16).hexdigest()}"


def digest_of_file(path: Path) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _is_held_out(ids: np.ndarray, key: str | None) -> bool:
    # the prefix makes this another choice than that of glm.data.problems, which looks at the bare key
    identity = ids.astype("<u4").tobytes() if key is None else f"validation {key}".encode()
    return int.from_bytes(hashlib.md5(identity).digest(), "big") % HELD_OUT_MODULUS == 0


def _hold_out_a_tail(offsets: list[int], held_out: list[int]) -> None:
    """When no document fell to validation: the last fiftieth of the longest becomes a held-out document of its own."""
    lengths = np.diff(offsets)
    longest = int(lengths.argmax())
    tail = max(2, int(lengths[longest]) // HELD_OUT_MODULUS)
    if lengths[longest] >= 2 * tail:
        offsets.insert(longest + 1, offsets[longest + 1] - tail)
        held_out.insert(longest + 1, 1)


def write_corpus(folder: Path, name: str, documents: Iterable[Document], *, vocab_size: int,
                 facts: dict[str, object], counted: Callable[[], dict] = dict, whole: bool = True) -> None:
    """Writes all documents; masks for all or for none. ``facts`` go into the .json, and what is ``counted`` at the end.

    ``whole`` False: one shard of a list, which may be empty or have nothing held out; ``write_shard_list`` looks after that.
    Every file gets its name only when complete, the .json last. Raises DataError if there is nothing to train on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind = np.uint16 if vocab_size <= 2**16 else np.uint32
    for left_by_a_killed_process in folder.glob(f".{name}.*.tmp"):
        left_by_a_killed_process.unlink()
    drafts = {suffix: folder / f".{name}.{os.getpid()}{suffix}.tmp" for suffix in (".bin", ".mask", ".idx")}
    offsets, held_out = [0], []
    masked = False
    try:
        with drafts[".bin"].open("wb") as tokens_out, drafts[".mask"].open("wb") as mask_out:
            for document in documents:
                array = np.asarray(document.ids, dtype=kind)
                tokens_out.write(array.tobytes())
                if document.mask is not None:
                    masked = True
                    mask_out.write(np.asarray(document.mask, dtype=np.uint8).tobytes())
                offsets.append(offsets[-1] + len(array))
                held_out.append(int(_is_held_out(array, document.key)))
            if whole:
                if not any(held_out) and held_out:
                    _hold_out_a_tail(offsets, held_out)
                if offsets[-1] < 2 or all(held_out):
                    raise _too_little(name, len(held_out), offsets[-1])
            for out in (tokens_out, mask_out):
                out.flush()
                os.fsync(out.fileno())
        _write_index(drafts[".idx"], offsets, held_out)
        if not masked:
            drafts.pop(".mask").unlink()
        files = {}
        for suffix, draft in drafts.items():
            files[name + suffix] = {"bytes": draft.stat().st_size, "blake2b": digest_of_file(draft)}
            draft.replace(folder / (name + suffix))
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
    write_json(folder / f"{name}.json", {
        **facts, **counted(), "dtype": kind.__name__, "documents": len(held_out), "held_out_documents": sum(held_out),
        "tokens": offsets[-1], "held_out_tokens": _held_out_tokens(offsets, held_out), "masked": masked, "files": files,
    })


def _held_out_tokens(offsets: list[int], held_out: list[int]) -> int:
    return int(np.diff(offsets) @ np.asarray(held_out, dtype=np.int64))


def trained_tokens(facts: dict) -> int:
    """Of a corpus, by its .json; those written before it was counted there hold out about this much."""
    return facts["tokens"] - facts.get("held_out_tokens", facts["tokens"] // HELD_OUT_MODULUS)


def _too_little(name: str, documents: int, tokens: int) -> DataError:
    return DataError(
        f"corpus {name}", f"{documents} documents, {tokens} tokens", "some text to train on and some to validate with",
        "give more text, or raise data.problems",
    )


def _write_index(path: Path, offsets: list[int], held_out: list[int]) -> None:
    with path.open("wb") as index_out:
        index_out.write(np.asarray(offsets, dtype=np.int64).tobytes() + np.asarray(held_out, dtype=np.uint8).tobytes())
        index_out.flush()
        os.fsync(index_out.fileno())


def write_shard_list(folder: Path, name: str, shards: list[str], facts: dict[str, object]) -> None:
    """Makes one corpus NAME of shards written before with ``whole=False``, in their order. ``facts`` go into the .json.

    Where no shard has a held-out document, the longest document of all gives its tail, as in a corpus of one shard.
    Raises DataError for a shard that is missing, torn or of another kind, and if there is nothing to train on.
    """
    described = {}
    for shard in shards:
        described[shard] = read_facts(folder, shard)
        if described[shard] is None:
            raise DataError(str(folder / f"{shard}.json"), "no such file", f"a shard of corpus {name}", "run the stage that writes it again")
    filled = {shard: facts for shard, facts in described.items() if facts["documents"]}
    for key in ("dtype", "masked"):
        kinds = {facts[key] for facts in filled.values()}
        if len(kinds) > 1:
            found = f"shards with {key} {' and '.join(map(str, sorted(kinds)))}"
            raise DataError(f"corpus {name}", found, "shards of one kind", "write them with one tokenizer, with masks all or none")
    if filled and not any(facts["held_out_documents"] for facts in filled.values()):
        longest = max(filled, key=lambda shard: int(np.diff(_shard(folder, shard, filled[shard]).offsets).max()))
        described[longest] = _hold_out_a_tail_of(folder, longest, filled[longest])
    counted = ["documents", "held_out_documents", "tokens"]
    if all("held_out_tokens" in facts for facts in described.values()):
        counted.append("held_out_tokens")
    totals = {key: sum(facts[key] for facts in described.values()) for key in counted}
    if totals["tokens"] < 2 or totals["held_out_documents"] == totals["documents"]:
        raise _too_little(name, totals["documents"], totals["tokens"])
    kind = next(iter(filled.values()))
    write_json(folder / f"{name}.json", {
        **facts, **totals, "dtype": kind["dtype"], "masked": kind["masked"], "fingerprint": _fingerprint(described.values()), "shards": shards,
        **{f"shard_{key}": [described[shard][key] for shard in shards] for key in ("documents", "tokens")},
    })


def _fingerprint(described: Iterable[dict]) -> str:
    """Of the documents: what the shards' files digest to, in order."""
    digests = [file["blake2b"] for facts in described for _, file in sorted(facts["files"].items())]
    return hashlib.blake2b(json.dumps(digests).encode(), digest_size=8).hexdigest()


def fingerprint(folder: Path, facts: dict) -> str:
    """Of the corpus ``read_facts`` gave: changes with its documents. A list written before it was kept there asks its shards."""
    if "shards" not in facts:
        return _fingerprint([facts])
    return facts.get("fingerprint") or _fingerprint(describe(folder, shard) for shard in facts["shards"])


def _hold_out_a_tail_of(folder: Path, name: str, facts: dict) -> dict:
    """Rewrites the index of a shard, and its description last: torn in between, it is named and written again."""
    shard = _shard(folder, name, facts)
    offsets, held_out = shard.offsets.tolist(), shard.held_out.tolist()
    _hold_out_a_tail(offsets, held_out)
    index = folder / f"{name}.idx"
    draft = folder / f".{name}.{os.getpid()}.idx.tmp"
    try:
        _write_index(draft, offsets, held_out)
        files = facts["files"] | {index.name: {"bytes": draft.stat().st_size, "blake2b": digest_of_file(draft)}}
        draft.replace(index)
    finally:
        draft.unlink(missing_ok=True)
    facts |= {
        "documents": len(held_out), "held_out_documents": sum(held_out), "held_out_tokens": _held_out_tokens(offsets, held_out), "files": files,
    }
    write_json(folder / f"{name}.json", facts)
    return facts


def torn(path: Path, name: str, found: str, expected: str) -> DataError:
    todo = f"delete {path.parent / name}.json; the next run tokenizes this corpus again"
    return DataError(str(path), found, expected, todo)


def describe(folder: Path, name: str) -> dict | None:
    """What NAME.json says, or None if there is none. Raises DataError if it is not readable."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if "shards" not in facts:
            facts["files"].items()
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise torn(path, name, f"not readable: {error!r}", "the description of a tokenized corpus") from error
    return facts


def read_facts(folder: Path, name: str) -> dict | None:
    """What NAME.json says, or None if there is none. Raises DataError if a file or shard it names is missing or torn."""
    facts = describe(folder, name)
    if facts is not None:
        files_of(folder, name, facts)
    return facts


def files_of(folder: Path, name: str, facts: dict) -> dict[str, dict]:
    """Size and digest of every file of a corpus. Raises DataError if one is missing or of another size."""
    files: dict[str, dict] = {}
    for shard in facts.get("shards", []):
        its = describe(folder, shard)
        if its is None:
            raise torn(folder / f"{name}.json", name, f"no shard {shard}", f"{len(facts['shards'])} shards beside it")
        files |= files_of(folder, shard, its)
    for file_name, file in facts.get("files", {}).items():
        part = folder / file_name
        if not part.is_file():
            raise torn(part, name, "no such file", f"{file['bytes']} bytes")
        if part.stat().st_size != file["bytes"]:
            raise torn(part, name, f"{part.stat().st_size} bytes", f"{file['bytes']} bytes")
        files[file_name] = file
    return files


@lru_cache(maxsize=OPEN_FILES)
def _mapped(path: Path, size: int, opening: object) -> np.ndarray:
    """The bytes of a file, kept for one ``opening`` of its corpus. Raises DataError if there are not ``size``."""
    try:
        found = path.stat().st_size
        if found == size == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype=np.uint8)
        if found == size:
            return np.memmap(path, mode="r").view(np.ndarray)
    except OSError as error:
        raise torn(path, path.stem, f"not readable: {error.strerror or error}", f"{size} bytes") from error
    raise torn(path, path.stem, f"{found} bytes", f"{size} bytes")


@dataclass(frozen=True)
class Shard:
    """Arrays as they lie in the files: tokens and mask [tokens], offsets int64[documents + 1], held_out uint8[documents].

    Take an array, read from it, let it go: held, it keeps its file open.
    """

    path: Path
    """Without suffix."""
    num_documents: int
    num_tokens: int
    dtype: str
    masked: bool
    opening: object

    def _bytes(self, suffix: str, size: int) -> np.ndarray:
        return _mapped(self.path.with_name(self.path.name + suffix), size, self.opening)

    @property
    def tokens(self) -> np.ndarray:
        dtype = np.dtype(self.dtype)
        return self._bytes(".bin", self.num_tokens * dtype.itemsize).view(dtype)

    @property
    def mask(self) -> np.ndarray | None:
        return self._bytes(".mask", self.num_tokens) if self.masked else None

    @property
    def _index(self) -> np.ndarray:
        return self._bytes(".idx", 9 * self.num_documents + 8)

    @property
    def offsets(self) -> np.ndarray:
        return self._index[: 8 * (self.num_documents + 1)].view(np.int64)

    @property
    def held_out(self) -> np.ndarray:
        return self._index[8 * (self.num_documents + 1) :]


@dataclass(frozen=True)
class TokenizedCorpus:
    """Memory-mapped, whatever its size. Documents are numbered through all shards.

    ``masked``: the shards have masks; ``separated``: every document already ends with <|endoftext|>.
    """

    name: str
    shards: tuple[Shard, ...]
    masked: bool
    fingerprint: str = ""
    """Changes with the documents."""

    @property
    def separated(self) -> bool:
        return not self.masked

    @cached_property
    def first_documents(self) -> np.ndarray:
        """int64[shards + 1]: number of the first document of each shard, and how many there are."""
        return np.cumsum([0, *(shard.num_documents for shard in self.shards)], dtype=np.int64)

    @cached_property
    def first_tokens(self) -> np.ndarray:
        """int64[shards + 1]: tokens before each shard, and how many there are."""
        return np.cumsum([0, *(shard.num_tokens for shard in self.shards)], dtype=np.int64)

    @property
    def num_documents(self) -> int:
        return int(self.first_documents[-1])

    @property
    def num_tokens(self) -> int:
        return int(self.first_tokens[-1])

    def _locate(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, number within it) of each document."""
        if len(self.shards) == 1:
            return np.zeros(len(documents), dtype=np.int64), documents
        shards = np.searchsorted(self.first_documents, documents, side="right") - 1
        return shards, documents - self.first_documents[shards]

    def places(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shard, first token within it, length) of each document."""
        shards, local = self._locate(documents)
        if len(self.shards) == 1:
            offsets = self.shards[0].offsets
            first = offsets[documents]
            return shards, first, offsets[documents + 1] - first
        first, lengths = np.empty((2, len(documents)), dtype=np.int64)
        for number in np.unique(shards).tolist():
            here, offsets = shards == number, self.shards[number].offsets
            first[here] = offsets[local[here]]
            lengths[here] = offsets[local[here] + 1] - first[here]
        return shards, first, lengths

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of each document."""
        return self.places(documents)[2]

    def held_out(self, documents: np.ndarray) -> np.ndarray:
        """Whether each document is for validation."""
        shards, local = self._locate(documents)
        held_out = np.empty(len(documents), dtype=bool)
        for number in np.unique(shards).tolist():
            here = shards == number
            held_out[here] = self.shards[number].held_out[local[here]] != 0
        return held_out

    def read(self, shards: np.ndarray, first: np.ndarray, lengths: np.ndarray, out: np.ndarray, at: np.ndarray, *,
             masks: bool = False) -> None:
        """Copies lengths[i] tokens (or their masks) of shards[i] from first[i] on to out[at[i]] and on."""
        opened, array = -1, np.empty(0)
        for shard, begin, length, place in zip(shards.tolist(), first.tolist(), lengths.tolist(), at.tolist()):
            if shard != opened:
                opened, array = shard, self.shards[shard].mask if masks else self.shards[shard].tokens
            out[place : place + length] = array[begin : begin + length]

    def _documents(self, held_out: bool) -> np.ndarray:
        parts = [first + np.flatnonzero((shard.held_out != 0) == held_out) for first, shard in zip(self.first_documents, self.shards)]
        return np.concatenate(parts)

    @property
    def training_documents(self) -> np.ndarray:
        """Numbers of all of them: 8 bytes a document."""
        return self._documents(False)

    @property
    def validation_documents(self) -> np.ndarray:
        return self._documents(True)


def _shard(folder: Path, name: str, facts: dict, opening: object = None) -> Shard:
    return Shard(folder / name, facts["documents"], facts["tokens"], facts["dtype"], facts["masked"], opening or object())


def open_corpus(folder: Path, name: str) -> TokenizedCorpus:
    """A corpus of one shard or of a list of them, of which only the list is read.

    Raises DataError if it is missing or torn, a file of a list when it is read (digests are checked when a stage prepares its data).
    """
    facts = describe(folder, name)
    if facts is None:
        raise DataError(str(folder / f"{name}.json"), "no such file", "a tokenized corpus", "run the stage from its beginning")
    if "shard_documents" in facts:
        counts = zip(facts["shards"], facts["shard_documents"], facts["shard_tokens"], strict=True)
        described = {shard: {**facts, "documents": documents, "tokens": tokens} for shard, documents, tokens in counts}
    else:  # one shard, or a list written before it counted its shards
        read_facts(folder, name)
        described = {shard: describe(folder, shard) for shard in facts.get("shards", [name])}
    opening = object()
    shards = tuple(_shard(folder, shard, its, opening) for shard, its in described.items() if its["documents"])
    return TokenizedCorpus(name, shards, facts["masked"], fingerprint(folder, facts))
