"""Documents to ids: by tiktoken where it gives the same ids, else by Hugging Face's library. Control tokens in a text are text."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from glm.tokenizer.fast import FastEncoder, NotRepresentable, build
from glm.tokenizer.load import without_added_tokens
from glm.tokenizer.special_tokens import CONTROL_TOKENS, END_OF_TEXT

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class TextEncoder:
    """Can be sent to another process."""

    folder: Path
    plain: "Tokenizer"
    fast: FastEncoder | None
    refused: str | None
    """Why ``fast`` is None."""
    end_of_text: int

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """uint32 ids of each text, none of them a control token's."""
        found = [self.fast.encode(text) for text in texts] if self.fast else [None] * len(texts)
        left = [number for number, ids in enumerate(found) if ids is None]
        slow = self.plain.encode_batch_fast([texts[number] for number in left], add_special_tokens=False) if left else []
        for number, encoding in zip(left, slow):
            found[number] = np.array(encoding.ids, dtype=np.uint32)
        return found


def text_encoder(folder: Path) -> TextEncoder:
    """The encoder of a tokenizer folder that ``load_tokenizer`` accepts."""
    description = (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")
    ends = [entry["id"] for entry in json.loads(description)["added_tokens"] if entry["content"] == END_OF_TEXT]
    fast, refused = None, None
    try:
        fast = build(description)
    except NotRepresentable as reason:
        refused = str(reason)
    return TextEncoder(Path(folder), without_added_tokens(description), fast, refused, ends[0])


def _alternatives(tokens: Sequence[str]) -> str:
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))


_ANGLED = re.compile("<(?:" + _alternatives([token[1:] for token in CONTROL_TOKENS if token.startswith("<")]) + ")")
_OTHERS = [token for token in CONTROL_TOKENS if not token.startswith("<")]


def count_control_strings(text: str) -> int:
    """How often a control token is spelled out in a text."""
    angled = len(_ANGLED.findall(text)) if "<" in text else 0
    return angled + sum(text.count(token) for token in _OTHERS)
