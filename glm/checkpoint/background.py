"""What the process does that writes a rank's part of a checkpoint while the rank trains on.

It is a fork of the rank, so the tensors it sees are those of the moment of the fork: on the host memory is copied where the
rank writes to it, on CUDA megatron has copied them to the CPU before. megatron's own function forks a process a file from
there; those would outlive a killed rank and, if one is killed, be waited for for ever, so its writer runs in threads here.
"""

import json
import os
import pickle
import queue
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from glm.checkpoint.manifest import range_digest
from glm.platform.lifetime import die_with_parent

_DIGESTS = ".digests"


class _Results:
    """What megatron's writer hands from the process to its rank, as a file: the queue it makes for that is a process of its own."""

    def __init__(self, path: Path):
        self.path = path

    def put(self, results) -> None:
        with self.path.open("wb") as file:
            pickle.dump(results, file)

    def get_nowait(self):
        """Called once, after the process has ended."""
        try:
            with self.path.open("rb") as file:
                results = pickle.load(file)
        except (FileNotFoundError, EOFError, pickle.UnpicklingError):
            raise queue.Empty from None
        self.path.unlink()
        return results


def expect_results(draft: Path, rank: int) -> None:
    """Before megatron plans a save: where its writer will look for results. It asks a module's variable (filesystem_async.py:47)."""
    filesystem_async._results_queue = _Results(draft / f".results.{rank}")


def in_background(request: AsyncRequest) -> AsyncRequest:
    """The request with our function in place of megatron's, and the same arguments."""
    if request.async_fn is None:  # nothing to write on this rank
        return request
    transforms, _ = request.async_fn.args
    return request._replace(async_fn=_write, async_fn_kwargs={"transforms": transforms, "parent": os.getpid()})


def gather_digests(draft: Path) -> dict[tuple[str, int, int], str]:
    """{(file, offset, bytes): sha256} of what all ranks wrote. Takes the lists away."""
    found = {}
    for path in draft.glob(f"{_DIGESTS}.*"):
        found |= {(file, offset, length): digest for file, offset, length, digest in json.loads(path.read_text(encoding="utf-8"))}
        path.unlink()
    return found


def _write(rank: int, buckets: list, results: _Results, *, transforms: list, parent: int) -> None:
    """Writes the files of this rank and digests them. Whatever goes wrong is in the results, which the rank reads."""
    die_with_parent()
    if os.getppid() != parent:  # it died before the kernel was told
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the rank decides what they mean; it waits for us, or we end with it
    torch.set_num_threads(1)  # threads of a fork's OpenMP do not exist
    draft = results.path.parent
    try:
        with ThreadPoolExecutor(max(1, len(buckets))) as pool:
            done = list(pool.map(lambda number: _write_file(transforms, number, buckets[number]), range(len(buckets))))
        (draft / f"{_DIGESTS}.{rank}").write_text(json.dumps([line for _, digests in done for line in digests]), encoding="utf-8")
        results.put({number: written for number, (written, _) in enumerate(done)})
    except (OSError, RuntimeError) as error:
        for path, *_ in buckets:  # a full disk has room for the reason again; without one the rank finds no results
            Path(path).unlink(missing_ok=True)
        results.put(RuntimeError(_reason(error)))


def _reason(error: BaseException) -> str:
    """In words; torch says of a write that failed only that the position is not the expected one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return f"{type(cause or error).__name__}: {cause or error}"


def _write_file(transforms: list, number: int, bucket: tuple) -> tuple[list, list[tuple[str, int, int, str]]]:
    """(megatron's results, [(file, offset, bytes, sha256)]) of one file."""
    told, running = queue.SimpleQueue(), queue.Queue()
    running.put(number)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, told, running, use_fsync=True)
    _, written = told.get()
    if isinstance(written, Exception):
        raise written
    places = [result.storage_data for result in written]
    path = Path(bucket[0])
    return written, [
        (place.relative_path, place.offset, place.length, range_digest(path, place.offset, place.length)) for place in places
    ]
