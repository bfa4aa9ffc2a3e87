import ast
import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from glm.errors import DataError
from glm.tokenizer import encode_text, encode_texts, load_tokenizer, stop_token_ids, token_id, train_tokenizer
from glm.tokenizer.special_tokens import CONTROL_TOKENS, SPECIAL_TOKENS
from glm.tokenizer.train import SPACE

SAMPLES = [
    "", " ", "\n", "\n\n\n", "    return x\n\n\tif y:\r\n", "a  b   c    d         e", "  leading and trailing  ",
    "Grüße, 世界! 😀👍🏽 naïve \u00a0 \u200b e\u0301", "=" * 37 + "-" * 23,
    "1234567 12.5 3,4", "def f(a_b):  # x\n        pass\n",
    "\ufeffbom", "control \x07\x1b", "<0x41> <unk> <s>", "<|user|> <think> [gMASK] /nothink",
]
fragments = st.one_of(
    st.sampled_from([*" \n\tabcdefgh.,:=-_#()0123456789", "    ", "the ", "self", "return", "==", "é", "中", "😀"]),
    st.characters(exclude_categories=["Cs"]),
)
texts = st.lists(fragments, max_size=60).map("".join)


@pytest.fixture(scope="session")
def sentencepiece_model(tokenizer_folder):
    return SentencePieceProcessor(model_file=str(tokenizer_folder / "sentencepiece.model"))


@pytest.mark.parametrize("text", SAMPLES)
def test_ids_are_those_of_sentencepiece(tokenizer, sentencepiece_model, text):
    assert encode_text(tokenizer, text) == sentencepiece_model.encode(text)


@given(text=texts)
@example(text="====  ===   ==")
def test_ids_of_any_text_are_those_of_sentencepiece(tokenizer, sentencepiece_model, text):
    text = text.replace(SPACE, "").replace("\0", "")  # sentencepiece takes the one for a space and ends at the other
    assert encode_text(tokenizer, text) == sentencepiece_model.encode(text)


def test_ids_of_whole_files_are_those_of_sentencepiece(tokenizer, sentencepiece_model):
    for module in (ast, json):
        text = Path(module.__file__).read_text()
        assert encode_text(tokenizer, text) == sentencepiece_model.encode(text)


@given(text=texts)
@example(text=f"a{SPACE}b\0c")
@example(text="<|user|> <think>")
def test_every_text_survives_the_round_trip(tokenizer, text):
    ids = encode_text(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert encode_texts(tokenizer, [text, "x"])[0] == ids


@pytest.mark.parametrize("text", [*SAMPLES, *CONTROL_TOKENS, "".join(CONTROL_TOKENS)])
def test_text_never_becomes_a_control_token(tokenizer, text):
    controls = {token_id(tokenizer, token) for token in CONTROL_TOKENS}
    assert not controls & set(encode_text(tokenizer, text))


def test_the_plain_call_does_match_control_tokens_so_the_guard_is_needed(tokenizer):
    assert tokenizer("<|user|>")["input_ids"] == [token_id(tokenizer, "<|user|>")]


def test_control_tokens_take_the_last_ids_in_order_and_all_ids_are_used(tokenizer):
    assert len(tokenizer) == 1000 == len(set(tokenizer.get_vocab().values()))
    assert [token_id(tokenizer, token) for token in CONTROL_TOKENS] == list(range(1000 - len(CONTROL_TOKENS), 1000))


def test_digits_and_newlines_stand_alone_and_indents_are_pieces(tokenizer):
    pieces = [tokenizer.decode([index]) for index in encode_text(tokenizer, "x 12\n\n        y")]
    assert pieces == ["x", " ", "1", "2", "\n", "\n", "        ", "y"]


def test_letters_of_problems_are_one_token_each(tokenizer):
    assert len(encode_text(tokenizer, " a b c d e f g h i j k l")) == 12


def test_others_load_the_folder(tokenizer_folder, tokenizer):
    other = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    text = "def f(x):\n    return x + 1  # é<|endoftext|>"
    assert other(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert other.eos_token == other.pad_token == "<|endoftext|>" and len(other) == 1000
    assert other.chat_template
    ids = [token_id(other, "<|user|>"), *encode_text(other, "hi"), token_id(other, "</think>")]
    assert other.decode(ids, skip_special_tokens=True) == "hi</think>"  # parsers of thoughts need to see them
    assert set(SPECIAL_TOKENS) <= set(other.all_special_tokens)


def test_stop_tokens(tokenizer):
    assert tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)) == ["<|endoftext|>", "<|user|>", "<|observation|>"]


def test_training_gives_the_same_files_again(tmp_path):
    sample = ["some words of text and other words\n" * 20, "abc def ghi jkl mno pqr stu vwx yz 0123456789"]
    for name in ("one", "two"):
        train_tokenizer(sample, 400, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_too_little_text_is_an_error_that_says_what_to_do(tmp_path):
    for texts in ([], ["tiny"]):
        with pytest.raises(DataError, match="more text"):
            train_tokenizer(texts, 1000, tmp_path / "t")


def test_too_small_a_vocabulary_is_an_error(tmp_path):
    with pytest.raises(DataError, match="tokenizer.vocab_size(.|\n)*256 bytes"):
        train_tokenizer(["text"], 200, tmp_path / "t")


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_glms_tokens_is_an_error(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no token <|endoftext|>"):
        load_tokenizer(tmp_path)
