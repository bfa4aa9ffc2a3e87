"""Readers, cleaning, language, scores, buckets and fill-in-the-middle, one by one."""

import gzip
import json
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm.errors import DataError, RecipeError
from glm.recipe.raw import FillInTheMiddle, Language, Quality, RawSource
from pretrain.buckets import SCORE_BINS, bucket_of, edges, score_bin
from pretrain.classifier import train_classifier
from pretrain.clean import clean
from pretrain.fill_in_the_middle import choose
from pretrain.heuristics import code_score, prose_score
from pretrain.language import check_languages, identify
from pretrain.readers import Piece, pieces, read
from pretrain.scorers import import_plugins, make_scorer
from tests.pretrain.planted import GERMAN, SPAM, essay, program

TEXTS = [essay(number, 3) + " é" for number in range(50)]


def saved_dataset(folder):
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(folder / "saved"))
    return {"path": str(folder / "saved")}


def written_jsonl(folder):
    (folder / "all.jsonl").write_text("\n\n".join(json.dumps({"body": text}, ensure_ascii=False) for text in TEXTS))
    return {"path": str(folder), "text_field": "body"}


def written_gzip(folder):
    with gzip.open(folder / "all.jsonl.gz", "wt") as out:
        out.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    return {"path": str(folder)}


def written_zstd(folder):
    with pyarrow.CompressedOutputStream(str(folder / "all.jsonl.zst"), "zstd") as out:
        out.write("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())
    return {"path": str(folder)}


def written_parquet(folder):
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "all.parquet", row_group_size=7)
    return {"path": str(folder)}


def written_files(folder):
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02}.txt").write_text(text)
    return {"path": str(folder)}


def streamed(folder):
    (folder / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return {"load_dataset": {"path": "json", "data_files": str(folder / "all.jsonl")}}


@pytest.mark.parametrize("write", [written_files, written_jsonl, written_gzip, written_zstd, written_parquet, saved_dataset, streamed])
def test_every_form_gives_the_same_documents_however_it_is_cut(tmp_path, write):
    source = RawSource(**write(tmp_path))
    found, numbers = [], []
    for task_bytes in (500, 3_000, 10**9):
        cut = pieces("web", source, task_bytes, 1, 0)
        numbers.append(len(cut))
        found.append([record for piece in cut for record in read(Piece.of_input(json.loads(json.dumps(piece.as_input()))), source)])
    assert [text for _, text in found[0]] == TEXTS and found[0] == found[1] == found[2]
    assert len({name for name, _ in found[0]}) == len(TEXTS)
    if write not in (written_gzip, written_zstd, streamed):    # one piece a file
        assert numbers[0] > numbers[1] > numbers[2] == 1


def test_a_broken_record_is_named_by_file_and_line_and_the_rest_is_read(tmp_path):
    lines = [json.dumps({"text": text}) for text in TEXTS]
    lines[20], lines[30] = "{", '{"text": "\\ud800"}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"one\ntwo \xff")
    source = RawSource(path=str(tmp_path))
    records = [text for piece in pieces("web", source, 700, 1, 0) for _, text in read(piece, source)]
    broken = [text.where for text in records if isinstance(text, DataError)]
    assert len(records) == 51
    assert broken == [f"{tmp_path}/a.jsonl, line 21", f"{tmp_path}/a.jsonl, line 31", f"{tmp_path}/b.txt, line 2"]


def test_a_file_that_ends_early_and_a_column_that_is_not_there_are_told(tmp_path):
    written_gzip(tmp_path)
    path = tmp_path / "all.jsonl.gz"
    whole = bytearray(path.read_bytes())
    flipped = whole[:]
    flipped[len(whole) // 2] ^= 255
    source = RawSource(path=str(path))
    for broken in (whole[:-40], flipped, whole[:20] + bytes(20) + whole[40:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="not readable to its end"):
            list(read(pieces("web", source, 10**6, 1, 0)[0], source))
    written_parquet(tmp_path)
    source = RawSource(path=str(tmp_path / "all.parquet"), text_field="content")
    with pytest.raises(DataError, match="columns text(.|\n)*text_field"):
        list(read(pieces("web", source, 10**6, 1, 0)[0], source))


@given(st.text())
def test_cleaning_twice_is_cleaning_once(text):
    assert clean(clean(text)) == clean(text)


def test_indentation_stays_and_control_characters_go():
    assert clean("\r\n  \n    def f():\r\n\treturn 1\x00\x1b\n\n") == "    def f():\n\treturn 1"


def test_languages_are_told_apart_and_unknown_codes_refused():
    assert identify(essay(1), ("de", "en"))[0] == "en" and identify(GERMAN)[0] == "de" and identify("这是一个关于语言模型训练数据的文档。")[0] == "zh"
    with pytest.raises(RecipeError, match="no language xx"):
        check_languages(Language(keep=("xx",)))
    with pytest.raises(RecipeError, match="leaves out"):
        check_languages(Language(keep=("en",), among=("de", "fr")))


def test_prose_scores_above_lists_spam_and_data():
    worse = [SPAM, "\n".join(f"- item {number}" for number in range(60)), " ".join(map(str, range(500))), "word " * 300,
             "{};" * 200, "lorem ipsum " * 80]
    assert min(prose_score(essay(number)) for number in range(20)) > 0.5 > 0.3 > max(map(prose_score, worse))
    assert prose_score("今天的天气很好，我们一起去公园散步。孩子们在草地上玩耍，老人们坐在树下聊天。" * 4 + "晚上大家回家吃饭。") > 0.3


def test_code_scores_above_generated_code_and_data():
    table = "VALUES = [\n" + "\n".join("    0x00, 0x00, 0x00," for _ in range(300)) + "\n]"
    worse = ["# Auto-generated, do not edit\n" + program(1), table, "x = '" + "QUJD" * 2000 + "'\n" * 10]
    assert min(code_score(program(number)) for number in range(20)) > 0.6 > max(map(code_score, worse))


def test_a_trained_classifier_tells_good_from_bad_and_its_file_holds_no_code(tmp_path):
    good, bad = [essay(number) for number in range(60)], [GERMAN + str(number) + SPAM[: 22 * (number + 1)] for number in range(40)]
    assert train_classifier(good, bad, tmp_path / "model.npz") > 0.9
    scorer = make_scorer(Quality(scorer="classifier", options={"model": str(tmp_path / "model.npz")}))
    assert min(scorer([essay(number) for number in range(100, 110)])) > 0.5 > max(scorer([GERMAN, SPAM]))
    (tmp_path / "torn.npz").write_bytes((tmp_path / "model.npz").read_bytes()[:100])
    with pytest.raises(DataError, match="python -m pretrain.classifier"):
        make_scorer(Quality(scorer="classifier", options={"model": str(tmp_path / "torn.npz")}))
    with pytest.raises(DataError, match="3 good"):
        train_classifier(good[:3], bad, tmp_path / "few.npz")


def test_a_plugin_registers_a_scorer_and_a_wrong_name_lists_the_known(tmp_path, monkeypatch):
    (tmp_path / "own_scorer.py").write_text(
        "from pretrain.scorers import register_scorer\n@register_scorer('length')\ndef make(most):\n"
        "    return lambda texts: [min(1, len(text) / most) for text in texts]\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    import_plugins(["own_scorer"])
    assert make_scorer(Quality(scorer="length", options={"most": 10}))(["12345"]) == [0.5]
    with pytest.raises(RecipeError, match="classifier, code, heuristics, length"):
        make_scorer(Quality(scorer="perplexity"))
    with pytest.raises(RecipeError, match="options"):
        make_scorer(Quality(scorer="length", options={"least": 1}))
    with pytest.raises(RecipeError, match="no_such_module"):
        import_plugins(["no_such_module"])


def test_quantile_edges_divide_the_bytes_and_score_edges_the_scores():
    drawn = np.random.default_rng(0)
    scores, sizes = drawn.random(20_000).astype(np.float32), drawn.integers(100, 1000, 20_000)
    histogram = np.bincount(score_bin(scores), weights=sizes, minlength=SCORE_BINS)
    buckets = bucket_of(scores, edges(Quality(buckets={"high": 0.9, "low": 0.25}), histogram))
    shares = [sizes[buckets == bucket].sum() / sizes.sum() for bucket in (-1, 0, 1)]
    assert np.allclose(shares, [0.25, 0.65, 0.1], atol=0.003)
    by_score = bucket_of(scores, edges(Quality(by="score", buckets={"high": 0.9, "low": 0.25}), histogram))
    assert (by_score == np.where(scores >= 0.9, 1, np.where(scores >= 0.25, 0, -1))).all()
    alone = np.zeros(SCORE_BINS)
    alone[700] = 5000
    assert bucket_of(np.array([0.7005], np.float32), edges(Quality(buckets={"high": 0.9, "low": 0.1}), alone)) == [0], "one document is average"


@given(st.text(min_size=3), st.integers(0, 5))
def test_no_part_of_a_rearranged_document_is_lost_or_empty(text, seed):
    cut = choose(text, "name", seed, FillInTheMiddle(rate=1))
    prefix, middle, suffix = text[: cut.first], text[cut.first : cut.last], text[cut.last :]
    assert prefix and middle and suffix
    assert sorted("".join(part for _, part in cut.parts(text))) == sorted(text)
    assert choose(text, "name", seed, FillInTheMiddle(rate=1)) == cut and choose(text, "name", seed, FillInTheMiddle(rate=0)) is None
