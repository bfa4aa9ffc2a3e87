"""What deduplication knows of a document: a hash of its normalised text, a MinHash signature, and the hashes of its bands.

Signatures are datasketch's (`MinHash`, scheme affine32), bands are cut as its `MinHashLSH` cuts them for a threshold: two documents
are compared if all rows of one band agree.
"""

import hashlib
import zlib
from functools import lru_cache

import numpy as np

from glm.recipe.raw import Deduplicate
from pretrain.words import normalised_words

SHINGLES_AT_ONCE = 4096
MISSED_WEIGHS = 0.9
"""Weight of pairs the bands miss against pairs they propose in vain; the latter cost a comparison, the former stay duplicates."""
_SEED = 1
_MIX = np.uint64(0x9E3779B97F4A7C15)


@lru_cache(maxsize=4)
def bands_and_rows(deduplicate: Deduplicate) -> tuple[int, int]:
    """(bands, rows of each) for the threshold."""
    from datasketch import MinHashLSH

    index = MinHashLSH(deduplicate.threshold, deduplicate.permutations, weights=(round(1 - MISSED_WEIGHS, 6), MISSED_WEIGHS))
    return index.b, index.r


@lru_cache(maxsize=4)
def _permutations(count: int) -> np.ndarray:
    """uint32[2, count]: datasketch's factors and offsets."""
    from datasketch import MinHash

    return MinHash(count, seed=_SEED, scheme="affine32").permutations


def _finalized(hashes: np.ndarray) -> np.ndarray:
    """MurmurHash3's last step, which the scheme puts before its permutations."""
    hashes = (hashes ^ (hashes >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    hashes = (hashes ^ (hashes >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return hashes ^ (hashes >> np.uint32(16))


def exact_hash(text: str, words: list[str]) -> np.ndarray:
    """uint64[2] of the normalised words; of the text itself where it has none."""
    normal = " ".join(words) if words else "\0" + text.strip()
    return np.frombuffer(hashlib.blake2b(normal.encode(), digest_size=16).digest(), dtype=np.uint64)


def shingles(words: list[str], length: int) -> np.ndarray:
    """uint32: distinct hashes of all runs of ``length`` words; of the whole where it is shorter."""
    hashes = np.fromiter(map(zlib.crc32, map(str.encode, words)), np.uint64, len(words))
    length = min(length, max(1, len(words)))
    mixed = np.zeros(max(0, len(words) - length + 1), np.uint64)
    for offset in range(length):
        mixed = (mixed + hashes[offset : offset + len(mixed)] + np.uint64(1)) * _MIX
        mixed ^= mixed >> np.uint64(29)
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def signature(words: list[str], deduplicate: Deduplicate) -> np.ndarray:
    """uint32[permutations]. The share of places where two agree estimates the Jaccard similarity of their shingles."""
    factors, offsets = (numbers[:, None] for numbers in _permutations(deduplicate.permutations))
    mixed = _finalized(shingles(words, deduplicate.shingle_words))
    least = np.full(deduplicate.permutations, 0xFFFFFFFF, np.uint32)
    for start in range(0, len(mixed), SHINGLES_AT_ONCE):    # arithmetic modulo 2^32, as the scheme has it
        np.minimum(least, (factors * mixed[None, start : start + SHINGLES_AT_ONCE] + offsets).min(axis=1), out=least)
    return least


def band_hashes(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """uint64[bands, documents] from uint32[documents, permutations]."""
    cut = signatures[:, : bands * rows].reshape(-1, bands, rows).astype(np.uint64)
    mixed = np.broadcast_to(np.arange(bands, dtype=np.uint64), cut.shape[:2]).copy()
    for row in range(rows):
        mixed = (mixed ^ cut[:, :, row]) * _MIX
        mixed ^= mixed >> np.uint64(31)
    return np.ascontiguousarray(mixed.T)


def text_signature(text: str, deduplicate: Deduplicate) -> tuple[np.ndarray, np.ndarray]:
    """(exact hash uint64[2], signature uint32[permutations]); what is not asked for is zeros."""
    words = normalised_words(text)
    if deduplicate.near:
        near = signature(words or list("".join(text.split())), deduplicate)    # without words (all symbols, another script): of characters
    else:
        near = np.zeros(deduplicate.permutations, np.uint32)
    return exact_hash(text, words), near
