from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm.data import packing
from glm.data.best_fit import best_fit, cut_to_pieces
from glm.data.blocks import Blocks
from glm.data.packing import PackedRows, TruncatedRows
from glm.data.tokenized import TokenizedCorpus

END = 9999
document_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=80)


def corpus_of(lengths: list[int], *, masked: bool = False) -> TokenizedCorpus:
    """Every token is another number, so each can be followed; plain documents end with END."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(offsets[-1], dtype=np.uint32)
    mask = (tokens % 3 == 0).astype(np.uint8) if masked else None
    if not masked:
        tokens[offsets[1:] - 1] = END
    shard = SimpleNamespace(
        tokens=tokens, offsets=offsets, held_out=np.zeros(len(lengths), np.uint8), mask=mask, num_documents=len(lengths), num_tokens=len(tokens),
    )
    return TokenizedCorpus("test", (shard,), masked)


def tokens_of(corpus: TokenizedCorpus) -> np.ndarray:
    return np.concatenate([shard.tokens for shard in corpus.shards])


def blocks_of(corpus: TokenizedCorpus, block_tokens: int = 100) -> Blocks:
    """Small blocks, so that a small corpus has several."""
    return Blocks(corpus, held_out=False, block_tokens=block_tokens)


def rows_of(lengths, capacity: int) -> list[list[int]]:
    row_of, rows = best_fit(np.array(lengths), capacity)
    return [np.flatnonzero(row_of == row).tolist() for row in range(rows)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_best_fit_places_every_document_once_and_overfills_no_row(lengths):
    rows = rows_of(lengths, 50)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 50 for row in rows)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=200))
def test_no_two_rows_of_best_fit_could_be_one(lengths):
    used = sorted(sum(lengths[index] for index in row) for row in rows_of(lengths, 50))
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
    packer = PackedRows(blocks_of(corpus), capacity, "s", False, seed)
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
    packer = TruncatedRows(blocks_of(corpus), capacity, END, "s", seed)
    epochs = 2
    blocks = -(-(-(-epochs * packer.epoch_tokens // capacity)) // packer.shuffled_rows)
    by_piece = {packer.piece(number): packer.row(number) for number in range(blocks * packer.shuffled_rows)}
    assert sorted(by_piece) == list(range(blocks * packer.shuffled_rows))
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
    first, again, other = (TruncatedRows(blocks_of(corpus), 200, END, "s", seed) for seed in (1, 1, 2))
    assert (first.row(0).token_ids == again.row(0).token_ids).all()
    assert (first.row(0).token_ids != first.row(1).token_ids).any()
    assert (first.row(0).token_ids != other.row(0).token_ids).any()


def test_rows_do_not_depend_on_the_order_of_asking():
    corpus = corpus_of([7, 3, 12, 30, 5, 9] * 20)
    for make in (
        lambda: PackedRows(blocks_of(corpus), 16, "s", False, 4),
        lambda: TruncatedRows(blocks_of(corpus), 16, END, "s", 4),
    ):
        one, two = make(), make()
        late = two.row(300)
        assert (one.row(5).token_ids == two.row(5).token_ids).all()
        assert (one.row(300).token_ids == late.token_ids).all()


def test_with_assistant_only_the_loss_stands_before_the_tokens_of_the_mask():
    corpus = corpus_of([10], masked=True)
    row = PackedRows(blocks_of(corpus), 16, "s", True, 0).row(0)
    learned = row.labels[row.loss_mask == 1]
    assert learned.tolist() == [3, 6, 9]  # token 0 is in the mask too, but nothing stands before it


def test_small_documents_of_one_length_are_not_sorted_together():
    rng = np.random.default_rng(0)
    lengths = rng.choice([20, 25, 30], size=600)
    rows = rows_of(lengths, 512)
    assert np.mean([len({int(lengths[index]) for index in row}) > 1 for row in rows]) > 0.9
    assert lengths.sum() / (512 * len(rows)) > 0.95


@given(st.lists(st.integers(1, 50), min_size=1, max_size=120))
def test_each_document_goes_into_the_fullest_row_it_fits_in(lengths):
    """Replayed in the order of placing: large ones by length, then the small ones as given."""
    large = sorted((i for i, length in enumerate(lengths) if length > 50 // 12), key=lambda i: -lengths[i])
    spaces: list[int] = []
    for index in [*large, *(i for i, length in enumerate(lengths) if length <= 50 // 12)]:
        fitting = [space for space in spaces if space >= lengths[index]]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append((min(fitting) if fitting else 50) - lengths[index])
    assert sorted(50 - sum(lengths[index] for index in row) for row in rows_of(lengths, 50)) == sorted(spaces)


@pytest.mark.parametrize("capacity", [64, 512])
def test_packing_wastes_little(capacity):
    lengths = np.random.default_rng(1).integers(20, 41, size=5000)
    assert lengths.sum() / (capacity * best_fit(lengths, capacity)[1]) > (0.95 if capacity == 512 else 0.85)


@pytest.mark.parametrize("capacity", [4096, 32_768, 131_072])
def test_rows_of_texts_as_long_as_real_ones_are_999_thousandths_full(capacity):
    lengths = np.maximum(1, np.random.default_rng(2).lognormal(6.5, 1.0, size=500_000)).astype(np.int64)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), 8192 * capacity))]
    pieces = cut_to_pieces(lengths, capacity)[2]
    assert lengths.sum() / (capacity * best_fit(pieces, capacity)[1]) > 0.999


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of 8 rows and groups of 4 windows, so that a small corpus has many."""
    monkeypatch.setattr(packing, "WINDOW_ROWS", 8)
    monkeypatch.setattr(packing, "SHUFFLED_TOKENS", 32 * 40)


def packers_of_many_windows():
    lengths = np.random.default_rng(3).integers(1, 90, size=400).tolist()
    corpus = corpus_of(lengths)
    return [PackedRows(blocks_of(corpus), 40, "s", False, 7), TruncatedRows(blocks_of(corpus), 40, END, "s", 7)]


def test_every_epoch_of_many_windows_reads_everything_once_in_an_order_of_its_own(small_windows):
    packed, truncated = packers_of_many_windows()
    assert len(packed.counts) > 20 and packed.group == 4 and len(packed.blocks) > 40
    whole = np.sort(tokens_of(packed.corpus))
    epochs = []
    for epoch in range(3):
        rows = [packed.row(epoch * packed.epoch_rows + number) for number in range(packed.epoch_rows)]
        assert (np.sort(np.concatenate([row.token_ids for row in rows])) == whole).all()
        epochs.append([row.token_ids[0] for row in rows])
    assert epochs[0] != epochs[1] != epochs[2]
    by_piece = {truncated.piece(number): truncated.row(number) for number in range(3 * truncated.shuffled_rows)}
    stream = np.concatenate([by_piece[piece].token_ids for piece in range(len(by_piece))])[: truncated.epoch_tokens]
    assert len(np.unique(stream[stream != END])) == (stream != END).sum()


def test_a_row_late_in_training_needs_nothing_of_earlier_epochs(small_windows):
    counts = packers_of_many_windows()[0].counts
    corpus = packers_of_many_windows()[0].corpus
    resumed = PackedRows(blocks_of(corpus), 40, "s", False, 7, counts=counts)
    assert resumed._window.cache_info().misses == 0
    late = resumed.row(3 * resumed.epoch_rows + 5)
    assert resumed._window.cache_info().misses == 1  # packed the window of the row
    straight = packers_of_many_windows()[0]
    for number in range(3 * straight.epoch_rows + 6):
        last = straight.row(number)
    assert (last.token_ids == late.token_ids).all()


def test_what_is_kept_does_not_grow_with_the_corpus(small_windows):
    kept = []
    for documents in (400, 4000):
        corpus = corpus_of([20] * documents)
        packed = PackedRows(blocks_of(corpus), 40, "s", False, 1)
        truncated = TruncatedRows(blocks_of(corpus), 40, END, "s", 1)
        for number in range(packed.epoch_rows):
            packed.row(number), truncated.row(number)
        kept.append([cache.cache_info().currsize for cache in (packed._window, packed._rows, truncated._documents, truncated._pieces)])
    assert kept[0] == kept[1]


@pytest.mark.parametrize("which", [0, 1])
def test_the_tokens_of_the_first_rows_are_those_that_are_read(small_windows, which):
    packer = packers_of_many_windows()[which]
    read = np.cumsum([0, *(len(packer.row(number).token_ids) for number in range(700))])
    assert [packer.tokens(rows) for rows in range(701)] == read.tolist()
    assert abs(packer.epochs(700) - read[-1] / packer.epoch_tokens) < 0.1
