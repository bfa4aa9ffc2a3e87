import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm.checkpoint.run_folder import write_json
from glm.data.batches import Batches
from glm.data.prepare import prepare
from glm.data.tokenized import OPEN_FILES, Document, open_corpus, read_facts, write_corpus, write_shard_list
from glm.errors import DataError
from glm.recipe.sections import Source
from glm.tokenizer.load import digest_of


def write_shards(folder, name, lists, **facts):
    """One shard for each list of documents, then the list of them."""
    shards = [f"{name}-{number:05}" for number in range(len(lists))]
    for shard, documents in zip(shards, lists):
        write_corpus(folder, shard, documents, vocab_size=800, facts={}, whole=False)
    write_shard_list(folder, name, shards, facts)


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [Document(rng.integers(0, 700, rng.integers(1, 90)).tolist()) for _ in range(count)]


@settings(max_examples=25)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any))
def test_a_list_of_shards_is_the_same_corpus_as_one_shard(tmp_path_factory, counts):
    folder = tmp_path_factory.mktemp("corpus")
    documents = texts(sum(counts) + 60)
    ends = np.cumsum(counts)
    lists = [documents[start:end] for start, end in zip([0, *ends], [*ends, len(documents)])]
    write_corpus(folder, "one", documents, vocab_size=800, facts={})
    write_shards(folder, "many", lists)
    one, many = open_corpus(folder, "one"), open_corpus(folder, "many")
    numbers = np.random.default_rng(1).permutation(one.num_documents)
    assert many.num_documents == one.num_documents and many.num_tokens == one.num_tokens
    assert (many.lengths(numbers) == one.lengths(numbers)).all() and (many.held_out(numbers) == one.held_out(numbers)).all()
    assert (many.training_documents == one.training_documents).all()
    for number in range(one.num_documents):
        read = []
        for corpus in (one, many):
            shard, first, length = corpus.places(np.array([number]))
            read.append(np.empty(length[0], dtype=np.int64))
            corpus.read(shard, first, length, read[-1], np.array([0]))
        assert (read[0] == read[1]).all()


def test_of_few_documents_in_shards_the_longest_gives_its_tail(tmp_path):
    write_shards(tmp_path, "few", [[Document(list(range(40)))], [Document(list(range(300)))], []])
    corpus = open_corpus(tmp_path, "few")
    assert corpus.num_documents == 3 and corpus.lengths(corpus.validation_documents).tolist() == [6]
    assert corpus.lengths(np.arange(3)).tolist() == [40, 294, 6]


def test_a_torn_shard_is_named(tmp_path):
    write_shards(tmp_path, "many", [texts(30), texts(30, 1)])
    torn = tmp_path / "many-00001.bin"
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="many-00001.bin"):
        read_facts(tmp_path, "many")
    with pytest.raises(DataError, match="many-00001.bin"):  # a list alone is opened, its files when they are read
        open_corpus(tmp_path, "many").shards[1].tokens
    torn.write_bytes(whole)
    (tmp_path / "many-00000.json").unlink()
    with pytest.raises(DataError, match="no shard many-00000"):
        read_facts(tmp_path, "many")


def test_a_list_written_before_it_counted_its_shards_is_the_same_corpus(tmp_path):
    write_shards(tmp_path, "many", [texts(30), [], texts(30, 1)])
    now, listed = open_corpus(tmp_path, "many"), json.loads((tmp_path / "many.json").read_text())
    write_json(tmp_path / "many.json", {key: listed[key] for key in listed.keys() - {"shard_documents", "shard_tokens", "fingerprint"}})
    then = open_corpus(tmp_path, "many")
    assert then.first_tokens.tolist() == now.first_tokens.tolist() and then.fingerprint == now.fingerprint


def test_a_corpus_of_more_shards_than_a_process_may_open_files_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # 400 shards
    few = texts(1200)
    write_shards(tmp_path, "many", [few[first : first + 3] for first in range(0, 1200, 3)])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES + 100, limits[1]))
    try:
        corpus = open_corpus(tmp_path, "many")
        assert len(corpus.shards) == 400 and len(corpus.training_documents) + len(corpus.validation_documents) == 1200
        shards, first, lengths = corpus.places(np.arange(1200)[::-1])
        out = np.empty(corpus.num_tokens, dtype=np.int64)
        corpus.read(shards, first, lengths, out, np.cumsum(lengths) - lengths)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert out.tolist() == [token for document in few[::-1] for token in document.ids]


def test_shards_with_and_without_masks_are_not_one_corpus(tmp_path):
    with pytest.raises(DataError, match="masked False and True"):
        write_shards(tmp_path, "mixed", [texts(30), [Document([1, 2, 3], [0, 1, 1])]])


def test_opening_a_corpus_reads_no_tokens_and_no_index_into_memory(tmp_path):
    """64 MB of tokens and as much index: a process that opens them stays as large as one that imports the module."""
    count = 8_000_000
    write_corpus(tmp_path, "large", texts(100), vocab_size=800, facts={})
    facts = json.loads((tmp_path / "large.json").read_text())
    np.zeros(count, np.uint16).tofile(tmp_path / "large.bin")
    with (tmp_path / "large.idx").open("wb") as index:
        index.write(np.arange(count + 1, dtype=np.int64).tobytes() + bytes(count))
    for suffix in (".bin", ".idx"):
        facts["files"][f"large{suffix}"]["bytes"] = (tmp_path / f"large{suffix}").stat().st_size
    write_json(tmp_path / "large.json", facts | {"documents": count, "tokens": count})
    program = (
        "import resource, sys; from pathlib import Path; from glm.data.tokenized import open_corpus\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "corpus = open_corpus(Path(sys.argv[1]), 'large'); assert corpus.num_tokens == 8_000_000\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 4_000  # KiB


def stage(tiny_stages, **sources):
    recipe = tiny_stages["pretrain_general"]
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": sources})})


def test_a_mixture_reads_what_a_prepare_stage_registered(tiny_stages, run_folder):
    write_shards(run_folder.data, "web-high", [texts(200), texts(100, 1)], tokenizer=digest_of(run_folder.tokenizer))
    recipe = stage(tiny_stages, web=Source(corpus="web/high", share=0.5), problems=Source(corpus="problems", share=0.5))
    with pytest.raises(DataError, match="none has run(.|\n)*prepare stage that makes web"):
        prepare(recipe, run_folder)
    write_json(run_folder.prepared, {"web/low": {"corpus": "web-low", "documents": 1, "tokens": 2}})
    with pytest.raises(DataError, match="source web(.|\n)*web/high(.|\n)*one of web/low"):
        prepare(recipe, run_folder)
    write_json(run_folder.prepared, {"web/high": {"corpus": "web-high", "documents": 300, "tokens": 13_000}})
    prepare(recipe, run_folder)
    rows = Batches(recipe, run_folder).rows(0, 20)
    assert [row.source for row in rows].count("web") == 10


def test_a_corpus_of_another_tokenizer_is_refused(tiny_stages, run_folder):
    write_shards(run_folder.data, "web-high", [texts(200)], tokenizer="another")
    write_json(run_folder.prepared, {"web/high": {"corpus": "web-high", "documents": 200, "tokens": 9_000}})
    with pytest.raises(DataError, match="tokenizer another"):
        prepare(stage(tiny_stages, web=Source(corpus="web/high", share=1)), run_folder)


def test_a_corpus_nobody_can_make_is_an_error_of_the_recipe():
    with pytest.raises(ValueError, match="prose, code(.|\n)*NAME/BUCKET"):
        Source(corpus="webb", share=1)
