"""A corpus as token ids on disk: NAME.bin (ids), NAME.idx (documents), NAME.mask (dialogues only) and NAME.json, written last.

.bin   ids of all documents one after another, uint16 or uint32
.idx   int64[documents + 1] offsets into .bin, then uint8[documents], 1 where a document is held out for validation
.mask  uint8 a token, 1 where the assistant writes
.json  sizes and digests of the others, counts; a corpus without it does not exist, one that contradicts it is torn
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm.checkpoint.run_folder import write_json
from glm.errors import DataError

HELD_OUT_MODULUS = 50
"""One document in this many is for validation."""


@dataclass(frozen=True)
class Document:
    """Tokens, and for a dialogue the mask of what the assistant writes. Documents of one ``key`` are held out together, in
    every corpus: a problem met in one is not validated with in another. Without a key, equal tokens are."""

    ids: list[int]
    mask: list[int] | None = None
    key: str | None = None


def _digest(path: Path) -> str:
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
                 facts: dict[str, object]) -> None:
    """Writes all documents; masks for all or for none. ``facts`` go into the .json.

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
            if not any(held_out) and held_out:
                _hold_out_a_tail(offsets, held_out)
            if offsets[-1] < 2 or all(held_out):
                raise DataError(
                    f"corpus {name}", f"{len(held_out)} documents, {offsets[-1]} tokens",
                    "some text to train on and some to validate with", "give more text, or raise data.problems",
                )
            for out in (tokens_out, mask_out):
                out.flush()
                os.fsync(out.fileno())
        with drafts[".idx"].open("wb") as index_out:
            index_out.write(np.asarray(offsets, dtype=np.int64).tobytes() + np.asarray(held_out, dtype=np.uint8).tobytes())
            index_out.flush()
            os.fsync(index_out.fileno())
        if not masked:
            drafts.pop(".mask").unlink()
        files = {}
        for suffix, draft in drafts.items():
            files[name + suffix] = {"bytes": draft.stat().st_size, "blake2b": _digest(draft)}
            draft.replace(folder / (name + suffix))
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
    write_json(folder / f"{name}.json", {
        **facts, "dtype": kind.__name__, "documents": len(held_out), "held_out_documents": sum(held_out),
        "tokens": offsets[-1], "masked": masked, "files": files,
    })


def _torn(path: Path, name: str, found: str, expected: str) -> DataError:
    todo = f"delete {path.parent / name}.json; the next run tokenizes this corpus again"
    return DataError(str(path), found, expected, todo)


def read_facts(folder: Path, name: str, *, check_digests: bool = False) -> dict | None:
    """What NAME.json says, or None if there is none. Raises DataError if a file it names is missing or torn."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        files = facts["files"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise _torn(path, name, f"not readable: {error!r}", "the description of a tokenized corpus") from error
    for file_name, file in files.items():
        part = folder / file_name
        if not part.is_file():
            raise _torn(part, name, "no such file", f"{file['bytes']} bytes")
        if part.stat().st_size != file["bytes"]:
            raise _torn(part, name, f"{part.stat().st_size} bytes", f"{file['bytes']} bytes")
        if check_digests and _digest(part) != file["blake2b"]:
            raise _torn(part, name, "another digest than when it was written", f"blake2b {file['blake2b']}")
    return facts


@dataclass(frozen=True)
class TokenizedCorpus:
    """Memory-mapped. ``mask`` is None for plain text; ``separated``: every document already ends with <|endoftext|>."""

    name: str
    tokens: np.ndarray
    offsets: np.ndarray
    held_out: np.ndarray
    mask: np.ndarray | None
    separated: bool

    @property
    def training_documents(self) -> np.ndarray:
        return np.flatnonzero(self.held_out == 0)

    @property
    def validation_documents(self) -> np.ndarray:
        return np.flatnonzero(self.held_out)

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        return self.offsets[documents + 1] - self.offsets[documents]


def open_corpus(folder: Path, name: str) -> TokenizedCorpus:
    """Raises DataError if the corpus is missing or torn (sizes; digests are checked when a stage prepares its data)."""
    facts = read_facts(folder, name)
    if facts is None:
        raise DataError(str(folder / f"{name}.json"), "no such file", "a tokenized corpus", "run the stage from its beginning")
    documents = facts["documents"]
    raw = np.fromfile(folder / f"{name}.idx", dtype=np.uint8)
    split = 8 * (documents + 1)
    return TokenizedCorpus(
        name=name,
        tokens=np.memmap(folder / f"{name}.bin", dtype=facts["dtype"], mode="r"),
        offsets=raw[:split].view(np.int64),
        held_out=raw[split:],
        mask=np.memmap(folder / f"{name}.mask", dtype=np.uint8, mode="r") if facts["masked"] else None,
        separated=not facts["masked"],
    )
