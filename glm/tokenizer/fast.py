"""Text to ids by tiktoken, many times as fast as Hugging Face's library and id for id the same.

tiktoken knows one rank a token: of all neighbours whose union is a token it joins those of the lowest rank, the leftmost first.
A tokenizer.json knows pairs: only the listed ones are joined. The two agree where every token, encoded alone by the list, ends
as itself: within the place of a token nothing but that sequence of merges can happen as long as no merge crosses its borders, so
the only pair that ever makes it is the last pair of that sequence, and its rank is the token's. ``build`` follows that sequence
for every token. A token that no merges reach is never made by either and left out.

Two forms are understood: bytes as the alphabet (GLM, GPT, Llama 3, Qwen), and characters with bytes for unknown ones (the
tokenizer ``glm.tokenizer.train`` makes). There tiktoken first joins the bytes of each known character, by ranks below all others;
what is left of an unknown one is spelled in bytes again.

Anything else is refused with the reason (``NotRepresentable``). Control tokens are no part of it: ``<|user|>`` in a text is text.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
"""GLM-4.5, Llama 3."""
QWEN = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ByteLevel splits by when it is told nothing else."""
COMPARED_PATTERNS = (CL100K, QWEN, GPT2)
"""The two libraries have regular expressions of their own; in these patterns every character was compared
(``tests/tokenizer/test_fast.py``)."""
LINES = r"\n|[^\n]+"
"""What Split("\\n", isolated) does."""
LONGEST_SPACE = 20_000
"""White space in one piece; tiktoken backtracks over it, and gives up at a hundred thousand."""
UNUSED = "\0\0none"
"""tiktoken looks for control tokens in every text, which is slow if there are none: an empty pattern is found everywhere. This one
is not allowed in any text, so where it is met it is text."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class NotRepresentable(Exception):
    """Why tiktoken cannot stand for a tokenizer."""


@dataclass(frozen=True)
class FastEncoder:
    """What ``build`` found; small to pickle, and ready at the first text."""

    pattern: str
    ranks: dict[bytes, int]
    ids: np.ndarray
    """uint32[ranks]: the id of each rank; for the beginnings of characters, which have no id, ``spelled`` has several."""
    spelled: dict[int, tuple[int, ...]]

    @cached_property
    def _encoding(self):
        from tiktoken import Encoding

        return Encoding("glm", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens={UNUSED: len(self.ids)})

    @cached_property
    def _is_spelled(self) -> np.ndarray:
        return np.isin(np.arange(len(self.ids)), list(self.spelled))

    def __getstate__(self):
        return {name: self.__dict__[name] for name in ("pattern", "ranks", "ids", "spelled")}

    def encode(self, text: str) -> np.ndarray | None:
        """uint32 ids of ``text``, none of them a control token's; None for a text with a wider space than tiktoken can split."""
        if len(text) > LONGEST_SPACE and _WIDE_SPACE.search(text):
            return None
        ranks = self._encoding.encode_to_numpy(text, disallowed_special=())
        if self.spelled and (at := np.flatnonzero(self._is_spelled[ranks])).size:
            spelled = [self.spelled[rank] for rank in ranks[at].tolist()]
            ids = np.insert(self.ids[ranks], np.repeat(at, [len(parts) - 1 for parts in spelled]), 0)
            starts = at + np.cumsum([0, *(len(parts) - 1 for parts in spelled)])[:-1]
            for start, parts in zip(starts.tolist(), spelled):
                ids[start : start + len(parts)] = parts
            return ids
        return self.ids[ranks]


_WIDE_SPACE = re.compile(rf"\s{{{LONGEST_SPACE}}}")


def build(tokenizer_json: str) -> FastEncoder:
    """Raises NotRepresentable with the reason. Takes a few seconds for a vocabulary of 150,000."""
    description = json.loads(tokenizer_json)
    model = description["model"]
    _require(model.get("type") == "BPE", f"a {model.get('type')} model, not BPE")
    _require(description.get("normalizer") is None, f"a normalizer ({(description.get('normalizer') or {}).get('type')})")
    _require(not model.get("dropout"), "dropout")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        _require(not model.get(key), key)
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    _require(all(len(pair) == 2 for pair in merges), "a merge that is not a pair")
    added = {entry["content"] for entry in description.get("added_tokens", [])}
    vocabulary = {token: index for token, index in model["vocab"].items() if token not in added}
    pair_ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
    reached = {token: rank for token in vocabulary if len(token) > 1 and (rank := merge_rank(token, pair_ranks)) is not None}
    if model.get("byte_fallback"):
        return _of_characters(vocabulary, reached, merges, _pattern_of_lines(description["pre_tokenizer"]))
    pattern = _pattern_of_bytes(description["pre_tokenizer"])
    unreached = [token for token in vocabulary if len(token) > 1 and token not in reached]
    _require(not (model.get("ignore_merges") and unreached), f"ignore_merges with {len(unreached)} tokens that no merges reach")
    return _of_bytes(vocabulary, reached, pattern)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise NotRepresentable(otherwise)


def merge_rank(token: str, pair_ranks: dict[tuple[str, str], int]) -> int | None:
    """Rank of the last merge when ``token`` is encoded alone; None if it does not end as one."""
    parts, rank, none = list(token), None, len(pair_ranks)
    while len(parts) > 1:
        ranks = [pair_ranks.get(pair, none) for pair in zip(parts, parts[1:])]
        rank = min(ranks)
        if rank == none:
            return None
        at = ranks.index(rank)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return rank


def byte_of_character() -> dict[str, int]:
    """The printable characters that ByteLevel writes for bytes (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


def _pattern_of_bytes(splitter: dict) -> str:
    parts = splitter["pretokenizers"] if splitter and splitter["type"] == "Sequence" else [splitter]
    last = parts[-1]
    _require(bool(last) and last["type"] == "ByteLevel" and not last["add_prefix_space"], f"a pre-tokenizer that is not ByteLevel: {last}")
    if len(parts) == 1 and last.get("use_regex", True):
        return GPT2
    _require(len(parts) == 2 and parts[0]["type"] == "Split" and not last.get("use_regex", True), "other pre-tokenizers than Split and ByteLevel")
    split = parts[0]
    _require(split["behavior"] == "Isolated" and not split["invert"], "a Split that is not isolated")
    pattern = split["pattern"].get("Regex")
    _require(pattern in COMPARED_PATTERNS, f"a pattern that was not compared: {pattern}")
    return pattern


def _pattern_of_lines(splitter: dict | None) -> str:
    isolated = splitter is not None and splitter["type"] == "Split" and splitter["behavior"] == "Isolated" and not splitter["invert"]
    _require(isolated and splitter["pattern"] == {"String": "\n"}, "a pre-tokenizer other than Split by line")
    return LINES


def _of_bytes(vocabulary: dict[str, int], reached: dict[str, int], pattern: str) -> FastEncoder:
    table = byte_of_character()
    missing = [character for character in table if character not in vocabulary]
    _require(not missing, f"{len(missing)} bytes without a token")
    ranks = {bytes([byte]): byte for byte in range(256)}
    ids = {byte: vocabulary[character] for character, byte in table.items()}
    for token, rank in reached.items():
        ranks[bytes(table[character] for character in token)] = 256 + rank
        ids[256 + rank] = vocabulary[token]
    return FastEncoder(pattern, ranks, _table(ids), {})


def _of_characters(vocabulary: dict[str, int], reached: dict[str, int], merges: list[tuple[str, str]], pattern: str) -> FastEncoder:
    byte_ids = {int(match[1], 16): index for token, index in vocabulary.items() if (match := BYTE_TOKEN.fullmatch(token))}
    _require(len(byte_ids) == 256, f"{256 - len(byte_ids)} bytes without a token")
    _require(not any(BYTE_TOKEN.fullmatch("".join(pair)) for pair in merges), "merges that make a byte's token")
    characters = [token for token in vocabulary if len(token) == 1]
    ranks = {bytes([byte]): byte for byte in range(256)}
    ids = byte_ids | {ord(character): vocabulary[character] for character in characters if ord(character) < 128}
    spelled: dict[int, tuple[int, ...]] = {}
    for character in characters:
        spelling = character.encode()
        for length in range(2, len(spelling)):
            if spelling[:length] not in ranks:
                spelled[len(ranks)] = tuple(byte_ids[byte] for byte in spelling[:length])
                ids[len(ranks)] = 0
                ranks[spelling[:length]] = len(ranks)
        if len(spelling) > 1:
            ids[len(ranks)] = vocabulary[character]
            ranks[spelling] = len(ranks)
    first = len(ranks)
    for token, rank in reached.items():
        if not BYTE_TOKEN.fullmatch(token):
            ranks[token.encode()] = first + rank
            ids[first + rank] = vocabulary[token]
    return FastEncoder(pattern, ranks, _table(ids), spelled)


def _table(ids: dict[int, int]) -> np.ndarray:
    table = np.zeros(max(ids) + 1, dtype=np.uint32)
    table[list(ids)] = list(ids.values())
    return table
