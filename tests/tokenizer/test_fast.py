"""The fast encoder against Hugging Face's library, which is the reference: the same ids for any text."""

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm.tokenizer import load_tokenizer, train_tokenizer
from glm.tokenizer.encode import count_control_strings, text_encoder
from glm.tokenizer.fast import CL100K, COMPARED_PATTERNS, GPT2, LONGEST_SPACE, NotRepresentable, build
from glm.tokenizer.load import without_added_tokens
from glm.tokenizer.special_tokens import CONTROL_TOKENS

SAMPLE = [path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.parent.glob("[a-h]*.py"))[:25]]
OTHER = "Ünïcödé, 汉字和数字１２３、カナ 🙂👩‍👩‍👧 ½ №7 naïve don't WE'LL it'ſ \u00a0\u3000\u2028 \t\r\n\r x\u0301 ﷺ 𝔘𐍈 \x00\x7f"


def byte_level(pattern: str = CL100K, *, pair_strings: bool = False, ignore_merges: bool = False) -> str:
    """tokenizer.json in GLM's form, trained on the standard library and a few other scripts."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == GPT2)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = bytes_alone if pattern == GPT2 else pre_tokenizers.Sequence([split, bytes_alone])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*SAMPLE, *[OTHER] * 20], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    description = json.loads(tokenizer.to_str())
    if pair_strings:
        description["model"]["merges"] = [" ".join(pair) for pair in description["model"]["merges"]]
    return json.dumps(description)


@pytest.fixture(scope="module")
def both_forms(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("characters")
    train_tokenizer([*SAMPLE, *[OTHER] * 20], 1500, folder)
    return {"bytes": byte_level(), "characters": (folder / "tokenizer.json").read_text(encoding="utf-8")}


@pytest.fixture(scope="module")
def encoders(both_forms):
    return [(build(description), without_added_tokens(description)) for description in both_forms.values()]


def same(encoders, text: str) -> None:
    for fast, reference in encoders:
        ids = fast.encode(text)
        assert ids.tolist() == reference.encode(text, add_special_tokens=False).ids, repr(text)


def test_real_text_has_the_same_ids(encoders):
    for text in [*SAMPLE, OTHER, *(path.read_text(encoding="utf-8") for path in Path(__file__).parents[2].rglob("*.md"))]:
        same(encoders, text)


ODD = st.sampled_from([
    " ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "'ſ", "a", "the", "self", "7", "2024", "汉字", "数", "é", "e\u0301", "🙂", "👩‍👩‍👧", "\u200d", "\u00a0",
    "\u2028", "\x00", "\x85", "Σ", "ς", "ﬀ", "½", "１", "٣", "<|user|>", "<think>", "//", "====", "->", "\ufeff", "\U0010ffff", "\ud7ff", "\ue000",
])


@settings(max_examples=400, deadline=None)
@given(st.lists(ODD | st.text(max_size=6), max_size=30).map("".join))
def test_any_text_has_the_same_ids(encoders, text):
    same(encoders, text)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(ODD, st.integers(1, 200)), max_size=8))
def test_long_runs_have_the_same_ids(encoders, runs):
    same(encoders, "".join(part * count for part, count in runs))


@given(st.sampled_from("ab "), st.integers(1, 40), st.sampled_from(["aab", "ab", "a", "ba", " ", "  a"]))
def test_overlapping_merges_are_made_from_the_left(encoders, start, count, period):
    same(encoders, start + period * count)


@pytest.mark.parametrize("pattern", COMPARED_PATTERNS)
def test_every_pattern_splits_as_the_reference_does(pattern):
    description = byte_level(pattern, pair_strings=True)
    encoders = [(build(description), without_added_tokens(description))]
    rng = random.Random(0)
    pieces = [" ", "\n", "\r", "\t", "a", "Zz", "'s", "'Ve", "12", "3456", "!", "/*", "字", "é", "🙂", "\u00a0", "\u2003"]
    for _ in range(1500):
        same(encoders, "".join(rng.choices(pieces, k=rng.randint(1, 14))))


@pytest.mark.full
@pytest.mark.parametrize("pattern", COMPARED_PATTERNS)
def test_every_character_splits_as_in_the_reference(pattern):
    """Each alone and among letters, digits, spaces and signs: the two libraries may know another version of Unicode."""
    description = byte_level(pattern)
    encoders = [(build(description), without_added_tokens(description))]
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    for start in range(0, len(points), 4096):
        some = [chr(point) for point in points[start : start + 4096]]
        same(encoders, "".join(f"{c}x{c}{c} {c}1{c}!{c}\n{c}'{c}" for c in some))


def test_a_wide_space_goes_to_the_reference(tmp_path, both_forms):
    (tmp_path / "tokenizer.json").write_text(both_forms["bytes"], encoding="utf-8")
    encoder = text_encoder(tmp_path)
    texts = ["a" + " " * 300_000 + "b", "\n" * LONGEST_SPACE + "x", "a" * 300_000, " \n" * 5000]
    assert encoder.fast.encode(texts[0]) is None and encoder.fast.encode(texts[2]) is not None
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        assert ids.tolist() == encoder.plain.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("form", ["bytes", "characters"])
def test_no_control_token_can_be_written_by_a_text(both_forms, form, tmp_path):
    (tmp_path / "tokenizer.json").write_text(both_forms[form], encoding="utf-8")
    encoder, controls = text_encoder(tmp_path), {entry["id"] for entry in json.loads(both_forms[form])["added_tokens"]}
    assert encoder.fast is not None and len(controls) == len(CONTROL_TOKENS) and encoder.end_of_text in controls
    for token in CONTROL_TOKENS:
        for text in (token, f"x{token}y", f" {token}\n{token}"):
            ids = encoder.encode([text])[0].tolist()
            assert not controls & set(ids) and encoder.plain.decode(ids) == text
            assert count_control_strings(text) == text.count(token)
    assert count_control_strings("<|use|> <thin> [MAS] /nothin < ") == 0


def test_the_encoder_travels_to_another_process(both_forms, tmp_path):
    (tmp_path / "tokenizer.json").write_text(both_forms["characters"], encoding="utf-8")
    encoder = text_encoder(tmp_path)
    encoder.encode(["warm"])
    (tmp_path / "encoder").write_bytes(pickle.dumps(encoder))
    program = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).encode(['naïve 🙂 text'])[0].tolist())"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "encoder")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(encoder.encode(["naïve 🙂 text"])[0].tolist())


def changed(description: str, **model) -> dict:
    description = json.loads(description)
    description["model"] |= model
    return description


def test_what_cannot_be_represented_is_refused_with_the_reason(both_forms):
    bytes_form = both_forms["bytes"]
    normalized = json.loads(bytes_form) | {"normalizer": {"type": "NFC"}}
    patterned = json.loads(bytes_form)
    patterned["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W"
    unreached = changed(bytes_form, ignore_merges=True)
    unreached["model"]["vocab"]["zqzqzq"] = 5000
    spaced = json.loads(bytes_form)
    spaced["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    for description, reason in (
        (normalized, "normalizer .NFC"), (patterned, "was not compared"), (unreached, "1 tokens that no merges reach"),
        (spaced, "not ByteLevel"), (changed(bytes_form, dropout=0.1), "dropout"), (changed(bytes_form, type="WordPiece"), "WordPiece"),
    ):
        with pytest.raises(NotRepresentable, match=reason):
            build(json.dumps(description))


def test_a_refused_tokenizer_still_encodes(both_forms, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(both_forms["bytes"]) | {"normalizer": {"type": "NFC"}}), encoding="utf-8")
    encoder = text_encoder(tmp_path)
    assert encoder.fast is None and "NFC" in encoder.refused
    assert encoder.encode(["e\u0301"])[0].tolist() == encoder.encode(["é"])[0].tolist()


def test_ranks_come_from_the_list_of_merges_and_not_from_the_ids(both_forms):
    """Without every 20th merge many tokens can no longer be made, alone or at all, and others are made by what is left."""
    description = json.loads(both_forms["bytes"])
    del description["model"]["merges"][::20]
    damaged = json.dumps(description)
    assert len(build(damaged).ranks) < 0.9 * len(build(both_forms["bytes"]).ranks)
    for text in SAMPLE[:8]:
        same([(build(damaged), without_added_tokens(damaged))], text)


def test_the_vocabulary_of_a_loaded_tokenizer_is_that_of_the_encoder(tmp_path):
    train_tokenizer(SAMPLE, 900, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = text_encoder(tmp_path).encode(["def f(x): return x"])[0].tolist()
    assert tokenizer.decode(ids) == "def f(x): return x"
