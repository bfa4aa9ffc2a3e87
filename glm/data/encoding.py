"""A stream of texts to ids, in order: in this process while there is little, then in one process a core."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from glm.data.tasks import worker_pool
from glm.errors import PlatformError
from glm.tokenizer.encode import TextEncoder, count_control_strings, text_encoder

BATCH_BYTES = 2**20
"""Text that is encoded at a time."""
ALONE_BYTES = 32 * 2**20
"""A smaller corpus is encoded before processes have started."""
AHEAD = 3
"""Batches a process may be ahead of the reader of the stream."""


@dataclass(frozen=True)
class Encoded:
    key: str
    ids: np.ndarray
    """uint32, the last one <|endoftext|>."""
    control_strings: int
    """Control tokens spelled out in the text, which are text in ``ids``."""


_encoder_of = lru_cache(maxsize=1)(text_encoder)
"""Of a worker process: built once."""


def _encode_in_worker(batch: list[tuple[str, str]], folder: Path) -> list[Encoded]:
    return encode_batch(batch, _encoder_of(folder))


def encode_batch(batch: list[tuple[str, str]], encoder: TextEncoder) -> list[Encoded]:
    """(key, text) of each document to its ids."""
    end = np.array([encoder.end_of_text], dtype=np.uint32)
    return [
        Encoded(key, np.concatenate([ids, end]), count_control_strings(text))
        for (key, text), ids in zip(batch, encoder.encode([text for _, text in batch]), strict=True)
    ]


def encode_stream(texts: Iterable[tuple[str, str]], encoder: TextEncoder, workers: int | None = None) -> Iterator[Encoded]:
    """(key, text) of each document, to the same for any number of workers; None: one a core. Memory holds a few batches."""
    workers = workers or len(os.sched_getaffinity(0))
    done = 0
    with ExitStack() as stack:
        pool: Executor | None = None
        waiting: deque = deque()
        for batch, size in _batches(texts):
            if workers == 1 or done < ALONE_BYTES:
                yield from encode_batch(batch, encoder)
                done += size
                continue
            if pool is None:
                pool = stack.enter_context(worker_pool(workers))
            waiting.append(pool.submit(_encode_in_worker, batch, encoder.folder))
            if len(waiting) > AHEAD * workers:
                yield from _result(waiting.popleft())
        for future in waiting:
            yield from _result(future)


def _result(future) -> list[Encoded]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise PlatformError(
            "a worker that tokenizes", "it died without a word (killed, or out of memory?)", "workers that live",
            "run the same command again; give the machine more memory if it happens again",
        ) from error


def _batches(texts: Iterable[tuple[str, str]]) -> Iterator[tuple[list[tuple[str, str]], int]]:
    batch, size = [], 0
    for key, text in texts:
        batch.append((key, text))
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size
