import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm.data.packing import PackedRows, TruncatedRows, best_fit, cut_to_pieces
from glm.data.tokenized import Shard, TokenizedCorpus

END = 9999
document_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=80)


def corpus_of(lengths: list[int], *, masked: bool = False) -> TokenizedCorpus:
    """Every token is another number, so each can be followed; plain documents end with END."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(offsets[-1], dtype=np.uint32)
    mask = (tokens % 3 == 0).astype(np.uint8) if masked else None
    if not masked:
        tokens[offsets[1:] - 1] = END
    return TokenizedCorpus("test", (Shard(tokens, offsets, np.zeros(len(lengths), np.uint8), mask),), masked)


def tokens_of(corpus: TokenizedCorpus) -> np.ndarray:
    return np.concatenate([shard.tokens for shard in corpus.shards])


def epoch_rows(packer, first_row_of_next_epoch: int):
    return [packer.row(number) for number in range(first_row_of_next_epoch)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_best_fit_places_every_document_once_and_overfills_no_row(lengths):
    rows = best_fit(np.array(lengths), 50)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 50 for row in rows)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=200))
def test_no_two_rows_of_best_fit_could_be_one(lengths):
    used = sorted(sum(lengths[index] for index in row) for row in best_fit(np.array(lengths), 50))
    assert len(used) < 2 or used[0] + used[1] > 50


@given(document_lengths, st.integers(1, 40))
def test_only_documents_longer_than_a_row_are_cut(lengths, capacity):
    document, start, length = cut_to_pieces(np.array(lengths), capacity)
    for index, whole in enumerate(lengths):
        mine = document == index
        assert length[mine].sum() == whole and (mine.sum() == 1 or whole > capacity)
        assert (start[mine] == np.cumsum(length[mine]) - length[mine]).all()
    assert length.max() <= capacity and length.min() > 0


@given(document_lengths, st.integers(2, 40), st.integers(0, 5))
def test_an_epoch_of_packed_rows_holds_every_token_once(lengths, capacity, seed):
    corpus = corpus_of(lengths, masked=True)
    packer = PackedRows(corpus, corpus.training_documents, capacity, "s", False, seed)
    rows = []
    while packer.epochs(len(rows)) < 1:
        rows.append(packer.row(len(rows)))
    assert sorted(np.concatenate([row.token_ids for row in rows])) == list(range(sum(lengths)))
    for row in rows:
        assert sum(row.document_lengths) == len(row.token_ids) == len(row.labels) == len(row.loss_mask) <= capacity
        ends = np.cumsum(row.document_lengths) - 1
        inside = np.delete(np.arange(len(row.token_ids)), ends)
        assert (row.labels[inside] == row.token_ids[inside] + 1).all()  # the next token of the same document
        assert (row.loss_mask[ends] == 0).all() and (row.loss_mask[inside] == 1).all()


@given(document_lengths, st.integers(2, 40), st.integers(0, 5), st.booleans())
def test_truncated_rows_read_every_token_once_an_epoch_without_gaps(lengths, capacity, seed, masked):
    corpus = corpus_of(lengths, masked=masked)
    packer = TruncatedRows(corpus, corpus.training_documents, capacity, END, "s", seed)
    epochs = 2
    blocks = -(-(-(-epochs * packer.epoch_tokens // capacity)) // packer.block_rows)
    by_piece = {packer.piece(number): packer.row(number) for number in range(blocks * packer.block_rows)}
    assert sorted(by_piece) == list(range(blocks * packer.block_rows))
    rows = [by_piece[piece] for piece in sorted(by_piece)]
    stream = np.concatenate([row.token_ids for row in rows])
    assert all(len(row.token_ids) == capacity and row.document_lengths == (capacity,) for row in rows)
    for epoch in range(epochs):
        tokens = stream[epoch * packer.epoch_tokens : (epoch + 1) * packer.epoch_tokens]
        assert sorted(tokens[tokens != END]) == sorted(tokens_of(corpus)[tokens_of(corpus) != END])
        assert (tokens == END).sum() == len(lengths)  # one after each document, whether stored or added
    labels = np.concatenate([row.labels for row in rows])
    assert (labels[:-1] == stream[1:]).all()


def test_epochs_have_different_orders_and_the_same_seed_the_same():
    corpus = corpus_of([5] * 40)
    first, again, other = (TruncatedRows(corpus, corpus.training_documents, 200, END, "s", seed) for seed in (1, 1, 2))
    assert (first.row(0).token_ids == again.row(0).token_ids).all()
    assert (first.row(0).token_ids != first.row(1).token_ids).any()
    assert (first.row(0).token_ids != other.row(0).token_ids).any()


def test_rows_do_not_depend_on_the_order_of_asking():
    corpus = corpus_of([7, 3, 12, 30, 5, 9] * 20)
    for make in (
        lambda: PackedRows(corpus, corpus.training_documents, 16, "s", False, 4),
        lambda: TruncatedRows(corpus, corpus.training_documents, 16, END, "s", 4),
    ):
        one, two = make(), make()
        late = two.row(300)
        assert (one.row(5).token_ids == two.row(5).token_ids).all()
        assert (one.row(300).token_ids == late.token_ids).all()


def test_with_assistant_only_the_loss_stands_before_the_tokens_of_the_mask():
    corpus = corpus_of([10], masked=True)
    row = PackedRows(corpus, corpus.training_documents, 16, "s", True, 0).row(0)
    learned = row.labels[row.loss_mask == 1]
    assert learned.tolist() == [3, 6, 9]  # token 0 is in the mask too, but nothing stands before it


def test_small_documents_of_one_length_are_not_sorted_together():
    rng = np.random.default_rng(0)
    lengths = rng.choice([20, 25, 30], size=600)
    rows = best_fit(lengths, 512)
    assert np.mean([len({int(lengths[index]) for index in row}) > 1 for row in rows]) > 0.9
    assert lengths.sum() / (512 * len(rows)) > 0.95


@pytest.mark.parametrize("capacity", [64, 512])
def test_packing_wastes_little(capacity):
    lengths = np.random.default_rng(1).integers(20, 41, size=5000)
    assert lengths.sum() / (capacity * len(best_fit(lengths, capacity))) > (0.95 if capacity == 512 else 0.85)
