"""Tokenizer training, loading, and GLM-4.5's chat format."""

from glm.tokenizer.chat_template import encode_dialogue, render, render_text
from glm.tokenizer.load import encode_text, encode_texts, load_tokenizer, stop_token_ids, token_id
from glm.tokenizer.train import train_tokenizer

__all__ = [
    "encode_dialogue", "encode_text", "encode_texts", "load_tokenizer", "render", "render_text", "stop_token_ids", "token_id",
    "train_tokenizer",
]
