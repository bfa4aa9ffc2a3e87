import hashlib
import json
import os
import re

import numpy as np
import pytest

from glm.checkpoint.run_folder import write_json
from glm.data import verified
from glm.data.batches import Batches, manifest_path
from glm.data.documents import dialogues, documents
from glm.data.prepare import corpus_name, prepare
from glm.data.tokenized import Document, digest_of_file, open_corpus, text_key, write_corpus
from glm.errors import DataError
from glm.recipe.sections import Source
from glm.tokenizer import load_tokenizer, token_id
from glm.tokenizer.special_tokens import END_OF_TEXT, USER


BUILT_IN = {name: Source(corpus=name, share=0.5) for name in ("repositories", "dialogues")}
"""Instead of what a prepare stage would have to make first."""


@pytest.fixture
def library(tmp_path):
    """300 text files with words of their own."""
    folder = tmp_path / "library"
    folder.mkdir()
    for i in range(300):
        (folder / f"{i:03}.txt").write_text("".join(f"file{i}word{j} " for j in range(8)))
    return folder


def stage(tiny_stages, name, **data):
    recipe = tiny_stages[name]
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})


def texts_of(tokenizer, rows):
    return [tokenizer.decode(row.token_ids) for row in rows]


def test_rows_hold_the_stages_proportions_and_validation_is_apart(tiny_stages, run_folder, library):
    recipe = stage(tiny_stages, "pretrain_general", documents=str(library), sources={
        "library": Source(corpus="prose", share=0.75), "problems": Source(corpus="problems", share=0.25),
    })
    prepare(recipe, run_folder)
    batches = Batches(recipe, run_folder)
    rows = batches.rows(0, 80)
    assert [row.source for row in rows].count("library") == 60
    assert all(len(row.token_ids) == recipe.sequence_length and row.loss_mask.all() for row in rows)
    tokenizer = load_tokenizer(run_folder.tokenizer)
    validation = batches.validation_rows(40)
    assert {row.source for row in validation} == {"library", "problems"}
    trained, held_out = (
        {number for text in texts_of(tokenizer, some) for number in re.findall(r"file(\d+)word", text)}
        for some in (batches.rows(0, 2000), validation)
    )
    assert len(trained) > 250 and held_out and not trained & held_out


def test_rows_are_the_same_however_they_are_asked_for(tiny_stages, run_folder, library):
    for name in ("pretrain_general", "midtrain_repo_code"):
        recipe = stage(tiny_stages, name, documents=str(library), **({"sources": BUILT_IN} if name == "midtrain_repo_code" else {}))
        prepare(recipe, run_folder)
        whole = Batches(recipe, run_folder).rows(3, 12)
        pieces = Batches(recipe, run_folder)
        parts = pieces.rows(9, 6)
        parts = pieces.rows(3, 6) + parts
        for one, two in zip(whole, parts, strict=True):
            assert one.source == two.source and (one.token_ids == two.token_ids).all() and (one.labels == two.labels).all()
        other = Batches(recipe.model_copy(update={"seed": 1, "stage": name}), run_folder).rows(3, 12)
        assert any(one.token_ids.tolist() != two.token_ids.tolist() for one, two in zip(whole, other))


def test_fine_tuning_learns_only_what_the_assistant_writes(tiny_stages, run_folder):
    recipe = stage(tiny_stages, "sft_cold_start")
    prepare(recipe, run_folder)
    row = Batches(recipe, run_folder).rows(0, 1)[0]
    tokenizer = load_tokenizer(run_folder.tokenizer)
    start = 0
    for length in row.document_lengths:
        ids, labels = row.token_ids[start : start + length], row.labels[start : start + length]
        mask = row.loss_mask[start : start + length]
        prompt, _, reply = tokenizer.decode(ids).partition("<|assistant|>")
        learned = tokenizer.decode(labels[mask == 1])
        if "/nothink" in prompt:
            reply = reply.removeprefix("\n<think></think>")
        assert learned == reply and learned.endswith(USER)
        start += length
    midtraining = tiny_stages["midtrain_reasoning"].model_copy(update={"data": recipe.data})
    prepare(midtraining, run_folder)
    everywhere = Batches(midtraining, run_folder).rows(0, 1)[0]
    assert everywhere.loss_mask.sum() == len(everywhere.token_ids) - len(everywhere.document_lengths)


def test_cut_dialogues_are_joined_by_the_end_of_text_token(tiny_stages, run_folder):
    recipe = stage(tiny_stages, "pretrain_general", sources={"dialogues": Source(corpus="dialogues", share=1)})
    prepare(recipe, run_folder)
    rows = Batches(recipe, run_folder).rows(0, 20)
    tokenizer = load_tokenizer(run_folder.tokenizer)
    before = [row.token_ids[at - 1] for row in rows for at in np.flatnonzero(row.token_ids == token_id(tokenizer, END_OF_TEXT)) if at]
    assert len(before) > 10 and set(before) == {token_id(tokenizer, USER)}


def test_a_problem_held_out_of_one_corpus_is_trained_on_in_none(tiny_stages, run_folder):
    sources = {name: Source(corpus=name, share=0.5) for name in ("problems", "dialogues")}
    recipe = stage(tiny_stages, "pretrain_general", sources=sources, problems=3000)
    prepare(recipe, run_folder)
    names = json.loads(manifest_path(run_folder, recipe.stage).read_text())["sources"]
    keys = {
        "problems": [key for key, _ in documents("problems", None, 3000, recipe.seed)],
        "dialogues": [key for key, _, _ in dialogues(3000, recipe.seed)],
    }
    trained, held_out = set(), set()
    for source, name in names.items():
        corpus = open_corpus(run_folder.data, name)
        trained |= {keys[source][i] for i in corpus.training_documents}
        held_out |= {keys[source][i] for i in corpus.validation_documents}
    assert set(keys["problems"]) & set(keys["dialogues"])  # or there would be nothing to keep apart
    assert len(held_out) > 60 and not trained & held_out


def test_a_text_has_one_key_in_every_corpus_and_stage(tmp_path, tiny_stages, run_folder, library):
    recipe = stage(tiny_stages, "pretrain_general", documents=str(library))
    prepare(recipe, run_folder)
    name = json.loads(manifest_path(run_folder, recipe.stage).read_text())["sources"]["prose"]
    held_out = set(open_corpus(run_folder.data, name).validation_documents.tolist())
    texts = [path.read_text() for path in sorted(library.iterdir())]
    # elsewhere with other tokens, after white space and among other documents
    elsewhere = [Document([7, 8, 9, number], key=text_key(f"\n{text}\n")) for number, text in enumerate(texts)]
    write_corpus(tmp_path, "elsewhere", elsewhere, vocab_size=800, facts={})
    assert held_out and held_out == set(open_corpus(tmp_path, "elsewhere").validation_documents.tolist())


def test_prepared_data_is_used_again_and_shared_by_stages(tiny_stages, run_folder, library):
    first = stage(tiny_stages, "pretrain_general", documents=str(library))
    prepare(first, run_folder)
    bins = {path: path.stat().st_mtime_ns for path in run_folder.data.glob("*.bin")}
    assert len(bins) == 1  # prose and code are the user's documents, tokenized once
    prepare(first, run_folder)
    prepare(stage(tiny_stages, "midtrain_repo_code", documents=str(library), sources=BUILT_IN), run_folder)
    assert bins.items() <= {path: path.stat().st_mtime_ns for path in run_folder.data.glob("*.bin")}.items()
    report = json.loads((run_folder.data / "report.json").read_text())
    assert report["pretrain_general"]["prose"]["documents"] + report["pretrain_general"]["prose"]["validation_documents"] == 300
    assert report["pretrain_general"]["prose"]["epochs"] > 1
    assert not list(run_folder.data.glob(".*"))


def test_a_changed_document_is_tokenized_again(tiny_stages, run_folder, library):
    recipe = stage(tiny_stages, "pretrain_general", documents=str(library))
    prepare(recipe, run_folder)
    (library / "000.txt").write_text("changed")
    prepare(recipe, run_folder)
    assert len(list(run_folder.data.glob("documents-*.bin"))) == 2


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".mask"])
def test_a_torn_file_is_named_and_deleting_its_description_rebuilds(tiny_stages, run_folder, suffix):
    recipe = stage(tiny_stages, "sft_cold_start")
    prepare(recipe, run_folder)
    torn = next(run_folder.data.glob(f"*{suffix}"))
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-5])
    for use in (lambda: Batches(recipe, run_folder), lambda: prepare(recipe, run_folder)):
        with pytest.raises(DataError, match=f"{torn.name}(.|\n)*bytes(.|\n)*delete"):
            use()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    torn.write_bytes(flipped)
    with pytest.raises(DataError, match="another digest"):
        prepare(recipe, run_folder)
    torn.unlink()
    with pytest.raises(DataError, match="no such file"):
        prepare(recipe, run_folder)
    torn.with_suffix(".json").unlink()
    prepare(recipe, run_folder)
    assert torn.read_bytes() == whole


def test_a_restart_reads_only_files_it_has_not_read_as_they_are(tiny_stages, run_folder, monkeypatch):
    read = []
    monkeypatch.setattr(verified, "digest_of_file", lambda path: read.append(path.name) or digest_of_file(path))
    recipe = stage(tiny_stages, "sft_cold_start")
    prepare(recipe, run_folder)
    prepare(recipe, run_folder)
    assert len(read) == len(set(read)) == 3
    prepare(recipe, run_folder)
    assert len(read) == 3
    os.utime(run_folder.data / read[0])
    prepare(recipe, run_folder)
    assert read[3:] == read[:1]
    (run_folder.data / "verified.json").write_text("torn")
    with pytest.raises(DataError, match="verified.json(.|\n)*remove it"):
        prepare(recipe, run_folder)


def test_a_stage_that_has_trained_notices_other_documents_of_the_same_name(tiny_stages, run_folder):
    recipe = stage(tiny_stages, "pretrain_general", sources={"web": Source(corpus="web/high", share=1)})
    write_json(run_folder.prepared, {"web/high": {"corpus": "web", "documents": 300, "tokens": 13_000}})

    def web(seed):
        tokens = np.random.default_rng(seed).integers(0, 700, (300, 40)).tolist()
        write_corpus(run_folder.data, "web", [Document(ids) for ids in tokens], vocab_size=800, facts={})

    web(0)
    prepare(recipe, run_folder)
    (run_folder.checkpoints(recipe.stage) / "step_00000001").mkdir(parents=True)
    prepare(recipe, run_folder)
    web(1)
    with pytest.raises(DataError, match="other text than the stage began with: web"):
        prepare(recipe, run_folder)
    manifest = json.loads(manifest_path(run_folder, recipe.stage).read_text())
    write_json(manifest_path(run_folder, recipe.stage), {key: manifest[key] for key in ("sources", "end_of_text")})
    prepare(recipe, run_folder)  # a manifest of names alone, as they were, says nothing of contents


def name_of_corpus(recipe, run_folder):
    digest = hashlib.blake2b((run_folder.tokenizer / "tokenizer.json").read_bytes(), digest_size=8).hexdigest()
    return corpus_name("prose", recipe.data, recipe.seed, digest)


def test_a_preparation_that_was_interrupted_leaves_no_corpus_and_is_begun_again(tiny_stages, run_folder, library):
    (library / "299.txt").write_bytes(b"fine\xff")
    recipe = stage(tiny_stages, "pretrain_general", documents=str(library))
    with pytest.raises(DataError, match="299.txt"):
        prepare(recipe, run_folder)
    assert not list(run_folder.data.glob("documents-*.json")) and not list(run_folder.data.glob(".*.tmp"))
    (library / "299.txt").write_text("fine")
    (run_folder.data / f".{name_of_corpus(recipe, run_folder)}.1.bin.tmp").write_bytes(b"left by a killed process")
    prepare(recipe, run_folder)
    assert Batches(recipe, run_folder).rows(0, 1) and not list(run_folder.data.glob(".*.tmp"))


def test_one_book_is_enough_and_its_tail_validates(tiny_stages, run_folder, tmp_path):
    (tmp_path / "book.txt").write_text(" ".join(f"word{i}" for i in range(3000)))
    recipe = stage(tiny_stages, "pretrain_general", documents=str(tmp_path / "book.txt"))
    prepare(recipe, run_folder)
    batches = Batches(recipe, run_folder)
    tokenizer = load_tokenizer(run_folder.tokenizer)
    assert "word2999" in "".join(texts_of(tokenizer, batches.validation_rows(16)))
    assert "word2999" not in "".join(texts_of(tokenizer, batches.rows(0, 300)))


def test_too_little_text_is_an_error(tiny_stages, run_folder, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="0 documents"):
        prepare(stage(tiny_stages, "pretrain_general", documents=str(tmp_path / "empty.txt")), run_folder)


def test_documents_too_short_to_give_one_a_tail_leave_nothing_to_validate_with(tiny_stages, run_folder):
    write_corpus(run_folder.data, "tiny", [Document([1], key=str(key)) for key in range(3)], vocab_size=800, facts={})
    write_json(run_folder.prepared, {"web/high": {"corpus": "tiny", "documents": 3, "tokens": 3}})
    for packing in ("truncate", "best_fit"):
        recipe = stage(tiny_stages, "pretrain_general", packing=packing, sources={"web": Source(corpus="web/high", share=1)})
        with pytest.raises(DataError, match="no document for validation among 3"):
            prepare(recipe, run_folder)


def test_reading_a_source_more_often_than_allowed_is_an_error(tiny_stages, run_folder, library):
    sources = {"library": Source(corpus="prose", share=1, epochs=2)}
    recipe = stage(tiny_stages, "pretrain_general", documents=str(library), sources=sources)
    with pytest.raises(DataError, match="source library(.|\n)*epochs(.|\n)*at most 2"):
        prepare(recipe, run_folder)


def test_a_stage_without_prepared_data_says_so(tiny_stages, run_folder):
    with pytest.raises(DataError, match="pretrain_general.json"):
        Batches(tiny_stages["pretrain_general"], run_folder)
