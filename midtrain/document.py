"""A document on its way into a corpus, and the tokenizer as the readers of this stage use it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

Encode = Callable[[list[str]], list[np.ndarray]]
"""uint32 ids of each text, none of them a control token's."""


def joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.uint32) for part in parts])


@dataclass(frozen=True)
class Draft:
    """``ids``: uint32; they end with the token that ends the document. ``key``: documents of one key are held out together."""

    bucket: str
    label: str
    """Where it comes from, for a person."""
    ids: np.ndarray
    key: str
    mask: np.ndarray | None = None
    """1 where the assistant writes."""
