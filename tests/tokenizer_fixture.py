"""A tokenizer folder with GLM's control tokens, made in milliseconds."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from glm.tokenizer import load_tokenizer
from glm.tokenizer.special_tokens import CONTROL_TOKENS, END_OF_TEXT, SPECIAL_TOKENS


def write_tokenizer(folder: Path, size: int) -> PreTrainedTokenizerFast:
    """``size`` tokens, the control tokens last."""
    pieces = {f"piece{i}": i for i in range(size - len(CONTROL_TOKENS))}
    tokenizer = Tokenizer(models.BPE(pieces, [], unk_token="piece0"))
    for token in CONTROL_TOKENS:
        tokenizer.add_tokens([AddedToken(token, special=token in SPECIAL_TOKENS, normalized=False)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT).save_pretrained(str(folder))
    return load_tokenizer(folder)
