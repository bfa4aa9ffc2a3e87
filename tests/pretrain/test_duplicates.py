"""Near-duplicates against exact Jaccard similarity, which knows nothing of MinHash, and against datasketch's own index."""

import random
import tracemalloc

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import given
from hypothesis import strategies as st

from glm.recipe.raw import Deduplicate
from pretrain.duplicates import candidate_pairs, exact_task, keep_first, resolve_task
from pretrain.reading import LIST, Readings, list_task
from pretrain.semantic import drop_close
from pretrain.signatures import band_hashes, bands_and_rows, exact_hash, shingles, signature, text_signature
from pretrain.words import normalised_words
from tests.pretrain.planted import essay

RULES = Deduplicate()


def edited(text: str, share: float, seed: int) -> str:
    """The text with a share of its words replaced."""
    drawn = random.Random(seed)
    return " ".join(f"other{drawn.random()}" if drawn.random() < share else word for word in text.split())


@pytest.fixture(scope="module")
def texts():
    """40 essays, each with copies edited by nothing to a fifth of the words."""
    return [edited(essay(number), share, 10 * number + place) for number in range(40) for place, share in enumerate((0, 0.005, 0.01, 0.02, 0.2))]


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    return len(np.intersect1d(one, other)) / len(np.union1d(one, other))


def test_what_is_dropped_is_what_exact_jaccard_calls_alike(texts):
    words = [normalised_words(text) for text in texts]
    sets = [{tuple(some[at : at + RULES.shingle_words]) for at in range(len(some) - RULES.shingle_words + 1)} for some in words]
    signatures = np.stack([signature(some, RULES) for some in words])
    bands, rows = bands_and_rows(RULES)
    proposed = set()
    for hashes in band_hashes(signatures, bands, rows):
        order = np.lexsort((np.arange(len(hashes)), hashes))
        proposed |= set(map(tuple, np.concatenate([*candidate_pairs(order, hashes[order])]).tolist()))
    decided = {pair for pair in proposed if (signatures[pair[0]] == signatures[pair[1]]).mean() >= RULES.threshold}
    wrong, alike = 0, 0
    for later in range(len(texts)):
        for earlier in range(later):
            exact = len(sets[earlier] & sets[later]) / len(sets[earlier] | sets[later])
            estimate = (signatures[earlier] == signatures[later]).mean()
            assert abs(exact - estimate) < 5 * np.sqrt(max(exact * (1 - exact), 0.01) / RULES.permutations)
            if abs(exact - RULES.threshold) > 0.1:    # three standard errors of an estimate from 128 places
                wrong += ((earlier, later) in decided) != (exact > RULES.threshold)
                alike += exact > RULES.threshold
    assert alike >= 60 and wrong == 0


def test_bands_propose_what_datasketch_s_index_finds(texts):
    bands, rows = bands_and_rows(RULES)
    signatures = np.stack([signature(normalised_words(text), RULES) for text in texts])
    index = MinHashLSH(num_perm=RULES.permutations, params=(bands, rows))
    theirs = set()
    for number, values in enumerate(signatures):
        minhash = MinHash(num_perm=RULES.permutations, seed=1, hashvalues=values, scheme="affine32")
        theirs |= {(int(other), number) for other in index.query(minhash)}
        index.insert(str(number), minhash)
    ours = set()
    for hashes in band_hashes(signatures, bands, rows):
        order = np.lexsort((np.arange(len(hashes)), hashes))
        ours |= set(map(tuple, np.concatenate([*candidate_pairs(order, hashes[order])]).tolist()))
    assert ours == theirs and len(ours) > 100


def test_signatures_are_datasketch_s_over_our_shingles():
    words = normalised_words(essay(1))
    minhash = MinHash(num_perm=RULES.permutations, seed=1, hashfunc=int, scheme="affine32")
    for value in shingles(words, RULES.shingle_words).tolist():
        minhash.update(value)
    assert (minhash.hashvalues == signature(words, RULES)).all()


@pytest.mark.parametrize(("one", "other", "equal"), [
    ("The cat, sat.", "the CAT sat", True), ("ﬁnal  text", "final\ntext", True), ("the cat sat", "the cat sits", False), ("+-+", "-+-", False),
    ("", " ", True),
])
def test_equal_after_normalisation(one, other, equal):
    hashes = [exact_hash(text, normalised_words(text)) for text in (one, other)]
    assert (hashes[0] == hashes[1]).all() == equal


def test_documents_without_words_are_alike_if_their_characters_are():
    art = "+---+--*--+\n|   |  *  |\n" * 9
    one, same, other = (text_signature(text, RULES)[1] for text in (art, art + "!", "(*) [=] {;} <~> /#/ " * 9))
    assert (one == same).mean() > RULES.threshold > 0.5 > (one == other).mean()


def peak_bytes(work, given: dict, folder) -> int:
    tracemalloc.start()
    work(given, folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_part_finds_its_share_of_the_pairs_in_its_share_of_memory(tmp_path):
    each, tasks = 20_000, 5
    drawn = np.random.default_rng(0)
    for task in range(tasks):
        (tmp_path / str(task)).mkdir()
        np.save(tmp_path / str(task) / "hashes.npy", np.tile(drawn.integers(0, 70_000, each, np.uint64), (2, 1)))
    readings = Readings(tmp_path, tuple(map(str, range(tasks))), (each,) * tasks, ("web",) * tasks)
    listed = {"readings": {"file": str(tmp_path / LIST), **list_task(readings.as_json(), tmp_path)}, "alive": None}
    peaks, pairs = {}, {}
    for parts in (1, 4):
        found = []
        for part in range(parts):
            peaks[parts] = peak_bytes(exact_task, listed | {"part": part, "parts": parts}, tmp_path)
            found += np.load(tmp_path / "pairs.npy").tolist()
        pairs[parts] = sorted(found)
    assert pairs[1] == pairs[4] and len(pairs[1]) > 10_000 and peaks[4] < 0.4 * peaks[1]
    np.save(tmp_path / "pairs.npy", np.array(pairs[1]))
    joined = {bands: peak_bytes(resolve_task, listed | {"pairs": [str(tmp_path / "pairs.npy")] * bands}, tmp_path) for bands in (2, 9)}
    assert joined[9] < 1.1 * joined[2]


@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=60), st.lists(st.booleans(), min_size=30, max_size=30))
def test_keeping_the_first_equals_an_index_that_documents_come_to_one_by_one(drawn, alive):
    pairs = np.array([(min(pair), max(pair)) for pair in drawn if pair[0] != pair[1]], np.int64).reshape(-1, 2)
    kept = []
    for document in np.flatnonzero(alive):
        if not any((other, document) in set(map(tuple, pairs.tolist())) for other in kept):
            kept.append(int(document))
    found, dropped = keep_first(np.array(alive), pairs)
    assert np.flatnonzero(found).tolist() == kept and len(dropped) == sum(alive) - len(kept)


def test_of_close_embeddings_the_best_scored_stays_and_blocks_do_not_matter(monkeypatch):
    drawn = np.random.default_rng(0)
    centres = drawn.normal(size=(20, 16))
    embeddings = np.repeat(centres, 15, axis=0) + 0.05 * drawn.normal(size=(300, 16))
    embeddings = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32)
    scores, documents = drawn.random(300).astype(np.float32), np.arange(300) * 3
    pairs = drop_close(documents, embeddings, scores, 0.9)
    monkeypatch.setattr("pretrain.semantic.COMPARED_AT_ONCE", 7)
    assert {dropped for _, dropped in drop_close(documents, embeddings, scores, 0.9).tolist()} == set(pairs[:, 1].tolist())
    stayed = sorted(set(range(300)) - set((pairs[:, 1] // 3).tolist()))
    assert len(stayed) == 20
    assert all(scores[group * 15 : group * 15 + 15].argmax() + group * 15 == stayed[group] for group in range(20))
