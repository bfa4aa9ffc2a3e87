"""Trains a byte-pair tokenizer with sentencepiece and writes it as a Hugging Face folder.

Digits stand alone, so does the newline; runs of spaces are pieces; what has no piece is spelled in bytes, so every text
survives the round trip. Control tokens take the last ids. In the folder: tokenizer.json (what everyone loads),
tokenizer_config.json, special_tokens_map.json, chat_template.jinja, and sentencepiece.model with the same ids for text.
"""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from glm.errors import DataError
from glm.tokenizer.chat_template import TEMPLATE
from glm.tokenizer.special_tokens import CONTROL_TOKENS, END_OF_TEXT, SPECIAL_TOKENS

SPACE = "\u2581"
"""What sentencepiece writes for a space inside its pieces."""
FEWEST_PIECES = 1 + 256 + 1
"""<unk>, the bytes, the newline."""
LONGEST_LINE = 4000
"""Bytes; sentencepiece leaves longer sentences out, so they are cut."""


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            if line.strip("\0 "):
                for start in range(0, len(line), LONGEST_LINE // 4):
                    yield line[start : start + LONGEST_LINE // 4].replace("\0", " ")


def train_sentencepiece(texts: Iterable[str], num_pieces: int) -> bytes:
    """The serialised sentencepiece model with exactly ``num_pieces`` pieces. Raises DataError if the text is too little."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts), model_writer=model, model_type="bpe", vocab_size=num_pieces,
            byte_fallback=True, split_digits=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, user_defined_symbols=["\n"],
            character_coverage=0.9995, bos_id=-1, eos_id=-1, pad_id=-1, unk_id=0, num_threads=1, minloglevel=2,
        )
    except RuntimeError as error:  # too few different pieces in the text, or no text at all
        reason = str(error).strip().splitlines()[-1]
        raise DataError(
            "tokenizer", f"sentencepiece cannot train: {reason}", f"text enough for {num_pieces} pieces",
            "give more text (data.documents), or lower tokenizer.vocab_size and model.vocab_size",
        ) from error
    return model.getvalue()


def _merges(pieces: list[str], ranks: dict[str, int]) -> list[tuple[str, str]]:
    """Byte-pair merges, best first: each piece from every pair of shorter pieces it can be split into.

    sentencepiece keeps no merges, it joins the neighbours whose union has the best score; ``ranks`` are those scores' order.
    """
    merges: list[tuple[str, str]] = []
    for piece in sorted(pieces, key=ranks.__getitem__):
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [pair for pair in splits if pair[0] in ranks and pair[1] in ranks]
    return merges


def convert(sentencepiece_model: bytes):
    """The ``tokenizers.Tokenizer`` that gives text the ids sentencepiece gives it.

    Pieces are stored with real spaces in place of sentencepiece's mark, so that a text that contains the mark survives.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    processor = SentencePieceProcessor(model_proto=sentencepiece_model)
    vocabulary: dict[str, int] = {}
    ranks: dict[str, int] = {}
    for index in range(processor.vocab_size()):
        piece = processor.id_to_piece(index)
        is_text = not (processor.is_byte(index) or processor.is_unknown(index))
        piece = piece.replace(SPACE, " ") if is_text else piece
        vocabulary[piece] = index
        if is_text and piece != "\n":
            ranks[piece] = index  # scores fall with the index
    merges = _merges([piece for piece in ranks if len(piece) > 1], ranks)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    for token in CONTROL_TOKENS:
        tokenizer.add_tokens([AddedToken(token, special=token in SPECIAL_TOKENS, normalized=False)])
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Trains on ``texts`` and fills ``folder``. ``vocab_size`` counts control tokens too. Raises DataError."""
    num_pieces = vocab_size - len(CONTROL_TOKENS)
    if num_pieces < FEWEST_PIECES + 64:
        raise DataError(
            "tokenizer.vocab_size", str(vocab_size),
            f"at least {FEWEST_PIECES + 64 + len(CONTROL_TOKENS)}: {len(CONTROL_TOKENS)} control tokens, 256 bytes, and letters",
            "raise tokenizer.vocab_size and model.vocab_size",
        )
    model = train_sentencepiece(texts, num_pieces)
    tokenizer = convert(model)
    assert tokenizer.get_vocab_size() == vocab_size, (tokenizer.get_vocab_size(), vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sentencepiece.model").write_bytes(model)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    special = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "padding_side": "left",
    }
    for name, value in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", {**special, "additional_special_tokens": list(SPECIAL_TOKENS[1:])}),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
