"""Loads a tokenizer folder, and turns text into ids that no text can forge.

Hugging Face tokenizers match control tokens anywhere, also inside what a user wrote. ``encode_text`` uses a copy without
them: ``<|user|>`` in a document is seven characters.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from glm.errors import DataError
from glm.tokenizer.special_tokens import CONTROL_TOKENS, STOP_TOKENS

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_plain_copies: "WeakKeyDictionary[PreTrainedTokenizerFast, Tokenizer]" = WeakKeyDictionary()


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """Raises DataError if the folder is missing, unreadable, or lacks a control token."""
    from transformers import PreTrainedTokenizerFast

    expected = "a tokenizer folder with GLM's control tokens"
    todo = "run the tokenizer stage, or delete the folder and run it again"
    if not (Path(folder) / "tokenizer.json").is_file():
        raise DataError(str(folder), "no tokenizer.json", expected, todo)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(str(folder), f"not loadable: {error}", expected, todo) from error
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in CONTROL_TOKENS if token not in vocabulary]
    if missing:
        raise DataError(str(folder), f"no token {', '.join(missing[:5])}", expected, todo)
    return tokenizer


def digest_of(folder: Path) -> str:
    """Names a tokenizer: 16 hexadecimal digits that change with its tokenizer.json."""
    return hashlib.blake2b((Path(folder) / "tokenizer.json").read_bytes(), digest_size=8).hexdigest()


def plain_tokenizer(tokenizer: "PreTrainedTokenizerFast") -> "Tokenizer":
    """The backend without its added tokens; the ids of text are the same."""
    if tokenizer not in _plain_copies:
        _plain_copies[tokenizer] = without_added_tokens(tokenizer.backend_tokenizer.to_str())
    return _plain_copies[tokenizer]


def without_added_tokens(tokenizer_json: str) -> "Tokenizer":
    """The tokenizer a tokenizer.json describes, which finds no control token in any text."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(json.loads(tokenizer_json) | {"added_tokens": [], "post_processor": None}))


def encode_text(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Ids of ``text``, none of them a control token's."""
    return plain_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids


def encode_texts(tokenizer: "PreTrainedTokenizerFast", texts: list[str]) -> list[list[int]]:
    """``encode_text`` of many."""
    return [encoding.ids for encoding in plain_tokenizer(tokenizer).encode_batch_fast(texts, add_special_tokens=False)]


def token_id(tokenizer: "PreTrainedTokenizerFast", token: str) -> int:
    return tokenizer.convert_tokens_to_ids(token)


def stop_token_ids(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Any of these ends a reply: <|endoftext|>, <|user|>, <|observation|>."""
    return [token_id(tokenizer, token) for token in STOP_TOKENS]
