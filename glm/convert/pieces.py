"""A conversion as pieces, each some bytes of a file to be written, done by several workers in bounded memory."""

import hashlib
import json
import os
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Hashable, Sequence

from tqdm import tqdm

from glm.convert.draft import Draft
from glm.convert.failures import explained
from glm.convert.streams import BLOCK, Stream

COMMIT_BYTES = 256 << 20
"""After so much has been written it is brought to the disk and noted: what a kill costs at most, beside what is under way."""


@dataclass(frozen=True)
class Part:
    """Consecutive bytes of one file."""

    file: str
    offset: int
    streams: tuple[Stream, ...]
    digest: Callable[[], Any] = hashlib.sha256
    """Makes the hash that the bytes are added to: of a tensor with its type and shape in it (glm.weights.digest)."""

    @property
    def nbytes(self) -> int:
        return sum(stream.nbytes for stream in self.streams)


@dataclass(frozen=True)
class Piece:
    """What one worker does at a time: proves what it reads (``proofs``), then writes ``parts``."""

    name: str
    parts: tuple[Part, ...] = ()
    proofs: tuple[Hashable, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def write(
    draft: Draft, pieces: Sequence[Piece], prove: Callable[[Any], None], *, digests: bool, workers: int, title: str,
) -> None:
    """Writes into ``draft`` the pieces that are not there yet. ``prove`` is called once for each proof that pieces ask for.

    Errors end it after the blocks under way; what was finished stays in the journal. An interruption does the same.
    Raises what reading and proving raise, CheckpointError naming the piece for a file that is gone, OSError when the disk
    is full.
    """
    todo = [piece for piece in pieces if piece.name not in draft.done]
    total, left = (sum(piece.nbytes for piece in some) for some in (pieces, todo))
    proofs, stop, local = _Once(prove), threading.Event(), threading.local()

    def work(piece: Piece) -> list[str]:
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(bytearray(BLOCK))
        with explained(piece.name):
            for proof in piece.proofs:
                if stop.is_set():
                    raise _Stopped
                proofs(proof)
            return [_write(draft.folder, part, local.buffer, digests, stop) for part in piece.parts]

    with tqdm(total=total, initial=total - left, desc=title, unit="B", unit_scale=True, disable=None) as bar:
        with ThreadPoolExecutor(workers, thread_name_prefix=title) as pool:
            running: dict[Future, Piece] = {}
            finished: list[tuple[Piece, list[str]]] = []
            waiting = iter(todo)
            try:
                while True:
                    # a few more than there are workers, so that none waits while this thread brings bytes to the disk
                    running |= {pool.submit(work, piece): piece for piece in islice(waiting, 4 * workers - len(running))}
                    if not running:
                        break
                    ended, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in ended:
                        piece = running.pop(future)
                        finished.append((piece, future.result()))
                        bar.update(piece.nbytes)
                    if sum(piece.nbytes for piece, _ in finished) >= COMMIT_BYTES:
                        # taken out first: the system tells of lost bytes once, so a second try would find all well
                        batch, finished = finished, []
                        _commit(draft, batch)
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)
                _commit(draft, finished)


def placement_digest(pieces: Sequence[Piece]) -> str:
    """Hex SHA-256 of where every byte goes: a draft begun with other chunks or files cannot be continued."""
    places = [[piece.name, [[part.file, part.offset, part.nbytes] for part in piece.parts]] for piece in pieces]
    return hashlib.sha256(json.dumps(places).encode()).hexdigest()


class _Stopped(Exception):
    """Another piece failed, or the user interrupted: this one is left as it is."""


class _Once:
    """Calls ``work`` once for each key; whoever asks for it meanwhile waits for the same outcome."""

    def __init__(self, work: Callable[[Any], None]):
        self._work, self._lock, self._outcomes = work, threading.Lock(), {}

    def __call__(self, key: Hashable) -> None:
        with self._lock:
            outcome, is_first = self._outcomes.get(key), key not in self._outcomes
            if is_first:
                outcome = self._outcomes[key] = Future()
        if is_first:
            try:
                outcome.set_result(self._work(key))
            except BaseException as error:
                outcome.set_exception(error)
                raise
        outcome.result()


def _write(folder: Path, part: Part, buffer: memoryview, digests: bool, stop: threading.Event) -> str:
    """The digest of the bytes written; empty without digests."""
    digest = part.digest()
    position = part.offset
    file = os.open(folder / part.file, os.O_WRONLY)
    try:
        for stream in part.streams:
            for block in stream.blocks(buffer):
                if stop.is_set():
                    raise _Stopped
                if digests:
                    digest.update(block)
                position = _put(file, block, position)
    except OSError as error:
        error.filename = error.filename or str(folder / part.file)
        raise
    finally:
        os.close(file)
    assert position == part.offset + part.nbytes, (part.file, part.offset, position)
    return digest.hexdigest() if digests else ""


def _put(file: int, block: memoryview, position: int) -> int:
    while block:
        count = os.pwrite(file, block, position)
        block, position = block[count:], position + count
    return position


def _commit(draft: Draft, finished: list[tuple[Piece, list[str]]]) -> None:
    if finished:
        draft.finished({piece.name: digests for piece, digests in finished}, {part.file for piece, _ in finished for part in piece.parts})
