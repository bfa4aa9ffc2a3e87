import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from glm.data import python_corpus
from glm.data.documents import CORPORA, TEXT_CORPORA, corpus_fingerprint, documents
from glm.errors import DataError


def read(path, corpus="prose"):
    return list(documents(corpus, str(path), 10, 0))


@pytest.mark.parametrize("corpus", TEXT_CORPORA)
def test_the_python_installation_gives_the_same_documents_every_time_up_to_the_limit(corpus):
    first = list(documents(corpus, None, 10, 0, limit_bytes=300_000))
    assert first == list(documents(corpus, None, 10, 0, limit_bytes=300_000))
    assert 300_000 <= sum(len(text.encode()) for _, text in first) < 1_500_000
    assert len({name for name, _ in first}) == len(first)


def test_code_and_repositories_share_no_file():
    modules = {name for name, _ in documents("code", None, 1, 0)}
    text = "".join(text for _, text in documents("repositories", None, 1, 0))
    files = [line.removeprefix("# file: ") for line in text.split("\n") if line.startswith("# file: ")]
    assert len(modules) > 50 and len(files) > 50 and len(set(files)) == len(files)
    assert not modules & set(files)


def test_the_users_folder_replaces_the_text_corpora_but_not_the_problems(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth", "id": 1}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["fifth", "sixth"], "n": [1, 2]}), tmp_path / "d.parquet")
    for corpus in TEXT_CORPORA:
        assert sorted(text for _, text in read(tmp_path, corpus)) == ["fifth", "first", "fourth", "second", "sixth", "third"]
    assert len(read(tmp_path, "problems")) == 10


def test_a_single_file_may_be_given(tmp_path):
    (tmp_path / "a.book").write_text("any suffix")
    assert [text for _, text in read(tmp_path / "a.book")] == ["any suffix"]


def check_error(path, *parts):
    with pytest.raises(DataError) as caught:
        read(path)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_a_missing_path_is_named(tmp_path):
    check_error(tmp_path / "nowhere", "nowhere", "no such file or folder")


def test_an_empty_folder_is_an_error(tmp_path):
    check_error(tmp_path, str(tmp_path), "an empty folder", "put text there")


def test_a_folder_without_text_says_what_it_has(tmp_path):
    (tmp_path / "x.png").write_bytes(b"1")
    check_error(tmp_path, ".png", ".parquet")


def test_undecodable_files_are_counted_and_the_first_is_named_with_its_line(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes("one\ntwo \xe9".encode("latin-1"))
    (tmp_path / "c.txt").write_bytes(b"\xff")
    check_error(tmp_path, "b.txt, line 2", "0xe9", "2 of 3 files")


@pytest.mark.parametrize("line, parts", [
    ('{"content": "x"}', ["line 2", "keys content", '"text"']),
    ('{"text": 3}', ["line 2", "a int"]),
    ("[1]", ["line 2", "a list"]),
    ('{"text": "x"', ["line 2", "not JSON"]),
    ('{"text": "\\ud800"}', ["line 2", "not Unicode"]),
    ('{"text": "x", "tree": ' + "[" * 100_000, ["line 2", "nested too deeply"]),
    ('{"text": "x", "id": ' + "9" * 5000 + "}", ["line 2", "not JSON"]),
])
def test_a_bad_line_of_jsonl_is_named(tmp_path, line, parts):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "good"}) + "\n" + line + "\n")
    check_error(tmp_path, "a.jsonl", *parts)


def test_parquet_without_the_column_lists_the_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "url": ["y"]}), tmp_path / "a.parquet")
    check_error(tmp_path, "a.parquet", "columns body, url", '"text"')


def test_parquet_with_a_null_names_the_row(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "a.parquet")
    check_error(tmp_path, "a.parquet, row 1", "NoneType")


def test_parquet_strings_that_are_not_utf8_name_the_row(tmp_path):
    raw = b"fine" + b"also" + "caf\xe9".encode("latin-1")
    offsets = pyarrow.py_buffer(np.array([0, 4, 8, 12], dtype=np.int32).tobytes())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, offsets, pyarrow.py_buffer(raw)])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    check_error(tmp_path, "a.parquet, row 2", "not UTF-8")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    (tmp_path / name).symlink_to("/proc/self/mem")  # opens for everyone, and fails to read at its beginning, for root too
    check_error(tmp_path, name, "not readable")


def test_broken_parquet_is_an_error(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    check_error(tmp_path, "a.parquet", "not readable as parquet")


def test_parquet_broken_in_its_middle_is_an_error(tmp_path):
    table = pyarrow.table({"text": [f"row {i} " * 50 for i in range(3000)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=500, compression="snappy")
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    raw[len(raw) // 3 : len(raw) // 2] = b"\xff" * (len(raw) // 2 - len(raw) // 3)
    (tmp_path / "a.parquet").write_bytes(raw)
    check_error(tmp_path, "a.parquet")


def test_an_unknown_corpus_lists_the_known_ones():
    with pytest.raises(DataError, match="prose, code, repositories, problems, dialogues"):
        list(documents("poems", None, 1, 0))


def test_the_fingerprint_follows_the_files_and_the_problems(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    first = corpus_fingerprint("prose", str(tmp_path), 10, 0)
    assert first == corpus_fingerprint("prose", str(tmp_path), 10, 0)
    (tmp_path / "a.txt").write_text("other")
    assert first != corpus_fingerprint("prose", str(tmp_path), 10, 0)
    others = {corpus_fingerprint("problems", None, count, seed) for count in (10, 20) for seed in (0, 1)}
    assert len(others) == 4
    assert len({corpus_fingerprint(corpus, None, 10, 0) for corpus in CORPORA}) == len(CORPORA)


def test_the_fingerprint_of_prose_follows_the_installed_packages(tmp_path, monkeypatch):
    before = {corpus: corpus_fingerprint(corpus, None, 10, 0) for corpus in TEXT_CORPORA}
    assert any(line.startswith("pyarrow==") for line in python_corpus.installed_packages())
    (tmp_path / "new-1.0.dist-info").mkdir()
    (tmp_path / "new-1.0.dist-info" / "METADATA").write_text("Name: new\nVersion: 1.0\n")
    monkeypatch.setattr(python_corpus.sysconfig, "get_path", lambda _: str(tmp_path))
    assert python_corpus.installed_packages() == ["new==1.0"]
    assert {corpus for corpus in TEXT_CORPORA if corpus_fingerprint(corpus, None, 10, 0) != before[corpus]} == {"prose"}
