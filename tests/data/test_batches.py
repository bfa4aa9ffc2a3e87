"""What a stage reads of each source: in tokens, over any prefix, and written down as it was."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm.checkpoint.run_folder import write_json
from glm.data.batches import Batches
from glm.data.prepare import prepare
from glm.data.tokenized import Document, write_corpus
from glm.recipe.sections import Source
from glm.tokenizer.load import digest_of

SHARES = {"full": 0.5, "half": 0.3, "small": 0.2}


@pytest.fixture(params=["best_fit", "truncate"])
def recipe(request, tiny_stages, run_folder):
    """A stage of 512-token rows with sources whose packed rows are full, little more than half full, and nearly full."""
    rng = random.Random(0)
    lengths = {"full": lambda: 64, "half": lambda: rng.randint(270, 300), "small": lambda: rng.randint(10, 90)}
    entries = {}
    for number, (name, length) in enumerate(lengths.items()):
        documents = [Document([rng.randrange(700) for _ in range(length())]) for _ in range(300)]
        write_corpus(run_folder.data, name, documents, vocab_size=800, facts={"tokenizer": digest_of(run_folder.tokenizer)})
        entries[f"made/{name}"] = {"corpus": name, "documents": 300, "tokens": sum(len(document.ids) for document in documents)}
    write_json(run_folder.prepared, entries)
    recipe = tiny_stages["midtrain_repo_code"]
    sources = {name: Source(corpus=f"made/{name}", share=share) for name, share in SHARES.items()}
    data = recipe.data.model_copy(update={"sources": sources, "packing": request.param})
    recipe = recipe.model_copy(update={"data": data, "tokens": 400 * 512})
    prepare(recipe, run_folder)
    return recipe


def read_tokens(batches: Batches, rows: int) -> Counter:
    read: Counter[str] = Counter()
    for row in batches.rows(0, rows):
        read[row.source] += len(row.token_ids)
    return read


def test_the_ledger_is_what_was_read(recipe, run_folder):
    batches = Batches(recipe, run_folder)
    for rows in (0, 1, 7, 100, 399):
        read = read_tokens(batches, rows)
        ledger = batches.ledger(rows)
        assert {name: taken.tokens for name, taken in ledger.items()} == {name: read[name] for name in SHARES}
        assert sum(taken.rows for taken in ledger.values()) == rows
        for name, taken in ledger.items():
            assert taken.epochs == pytest.approx(read[name] / batches.report()[name]["tokens"], abs=0.05)
    apart = batches.ledger_of([(0, 50), (120, 30)])
    left_out = read_tokens(batches, 150) - (read_tokens(batches, 120) - read_tokens(batches, 50))
    assert {name: taken.tokens for name, taken in apart.items()} == {name: left_out[name] for name in SHARES}


def test_shares_are_of_tokens_over_any_prefix_however_full_the_rows_of_a_source_are(recipe, run_folder):
    batches = Batches(recipe, run_folder)
    by_row = [(row.source, len(row.token_ids)) for row in batches.rows(0, 400)]
    taken: Counter[str] = Counter()
    for source, tokens in by_row:
        taken[source] += tokens
        total = sum(taken.values())
        for name, share in SHARES.items():
            assert abs(taken[name] - share * total) <= 3 * 512
    if recipe.data.packing == "best_fit":  # or rows and tokens would be the same thing
        rows = Counter(source for source, _ in by_row)
        assert rows["half"] > 1.4 * 0.3 * 400 and rows["full"] < 0.45 * 400


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(0, 2000), ranks=st.sampled_from([1, 2, 3, 4, 6]), per_rank=st.integers(1, 3))
def test_ranks_together_read_the_rows_that_one_reads(recipe, run_folder, first, ranks, per_rank):
    """Each with objects of its own, as after a restart."""
    count = ranks * per_rank
    whole = Batches(recipe, run_folder).rows(first, count)
    parts = [row for rank in range(ranks) for row in Batches(recipe, run_folder).rows(first + rank * per_rank, per_rank)]
    for one, two in zip(whole, parts, strict=True):
        assert one.source == two.source and (one.token_ids == two.token_ids).all() and (one.loss_mask == two.loss_mask).all()


def test_a_restart_reads_neither_index_nor_lengths_again(recipe, run_folder, monkeypatch):
    from glm.data.blocks import Blocks
    from glm.data.packing import PackedRows

    expected = Batches(recipe, run_folder).rows(5, 3)

    def counted_again(self):
        raise AssertionError("counted again")

    monkeypatch.setattr(Blocks, "_count", counted_again)
    monkeypatch.setattr(PackedRows, "_count", counted_again)
    again = Batches(recipe, run_folder).rows(5, 3)
    assert all((one.token_ids == two.token_ids).all() for one, two in zip(expected, again))
    for kept in (run_folder.data / "counts").iterdir():
        kept.unlink()
    with pytest.raises(AssertionError, match="counted again"):
        Batches(recipe, run_folder)


def test_a_corpus_written_anew_is_counted_anew(recipe, run_folder):
    before = Batches(recipe, run_folder).report()["small"]
    documents = [Document(np.arange(200).tolist()) for _ in range(50)] + [Document([1, 2, number]) for number in range(200)]
    write_corpus(run_folder.data, "small", documents, vocab_size=800, facts={})
    after = Batches(recipe, run_folder).report()["small"]
    assert after["documents"] + after["validation_documents"] == 250 != before["documents"] + before["validation_documents"]
