"""Saving while training goes on: megatron's distributed format, written by a fork of each rank, published whole or not at all.

A save has three parts. ``begin`` gathers and copies the state (the only time the loop waits); a process of every rank writes
and digests its files; ``poll`` or ``finish`` gathers the digests, writes the manifest, renames the draft to its name and
removes old checkpoints. At most one save is under way.
"""

import shutil
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from glm.checkpoint.background import expect_results, gather_digests, in_background
from glm.checkpoint.manifest import MANIFEST, CheckpointInfo, digest_files, seal, step_folder
from glm.checkpoint.retention import MILESTONE, clear_drafts, remove, retire_old
from glm.checkpoint.run_folder import sync, write_json
from glm.checkpoint.state import params_type, sharded_state, stored_bytes
from glm.errors import FULL, PlatformError, SaveError, UserError
from glm.platform import active
from glm.recipe.sections import Model
from glm.runtime import Runtime

_FAILURES = (OSError, RuntimeError, CheckpointingException, CheckpointException)  # a writer's death is a RuntimeError


@dataclass(frozen=True)
class Written:
    """A checkpoint that is there now."""

    path: Path
    step: int
    bytes: int
    """Of all ranks' tensors, as they lie in memory."""
    stall_seconds: float
    """How long training stood still for it."""
    seconds: float
    """From the beginning to the name."""


@dataclass
class _UnderWay:
    draft: Path
    info: CheckpointInfo
    manifest: dict
    milestone: bool
    bytes: int
    started: float
    stalled: float


class CheckpointWriter:
    """Saves the checkpoints of one stage. Every method is called by all ranks at the same step.

    When a save failed, raises PlatformError if the disk is full and SaveError otherwise, at once or when its end is noticed; what was
    there before is untouched.
    """

    def __init__(self, folder: Path, runtime: Runtime, keep: int):
        self.folder, self.runtime, self.keep = folder, runtime, keep
        self._calls = AsyncCallsQueue()
        self._under_way: _UnderWay | None = None
        self._validated = False
        self._deleting: list[threading.Thread] = []
        if runtime.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            clear_drafts(folder)
        dist.barrier()

    def begin(self, info: CheckpointInfo, shape: Model, chunks, optimizer=None, *, milestone: bool = False, about: dict | None = None) -> Written | None:
        """Copies the state and starts writing it. Returns the save before this one if it had to be waited for.

        ``optimizer`` None: weights only. ``about``: further entries of the manifest.
        """
        before = self.finish()
        started = time.perf_counter()
        state = sharded_state(chunks, optimizer)
        size = self._require_space(state)
        draft = self._draft(info.step)
        manifest = {"info": asdict(info), "model": shape.model_dump(), "params": params_type(chunks)} | (about or {})
        self._under_way = _UnderWay(draft, info, manifest, milestone, size, started, 0.0)
        state["rng"] = active().rng_state()  # alike on all ranks: nothing random is drawn after the weights
        try:
            expect_results(draft, self.runtime.rank)
            request = serialization.save(state, str(draft), async_sharded_save=True, validate_access_integrity=not self._validated)
            self._calls.schedule_async_request(in_background(request))
        except _FAILURES as error:
            raise self._failed(error) from error
        self._validated = True  # the same tensors lie on the same ranks until the stage ends
        self._under_way.stalled = time.perf_counter() - started
        return before

    def poll(self) -> Written | None:
        """Publishes the save under way if every rank has written its part."""
        return self._end(blocking=False)

    def finish(self) -> Written | None:
        """Waits for the save under way, if there is one, publishes it, and has deleted what it replaced."""
        written = self._end(blocking=True)
        while self._deleting:
            self._deleting.pop().join()
        return written

    def _end(self, blocking: bool) -> Written | None:
        if self._under_way is None:
            return None
        started, save = time.perf_counter(), self._under_way
        try:
            if not self._calls.maybe_finalize_async_calls(blocking=blocking):
                save.stalled += time.perf_counter() - started
                return None
            final = self._publish(save)
        except _FAILURES as error:
            raise self._failed(error) from error
        self._under_way, now = None, time.perf_counter()
        return Written(final, save.info.step, save.bytes, save.stalled + now - started, now - save.started)

    def _publish(self, save: _UnderWay) -> Path:
        final = self.folder / step_folder(save.info.step)
        failure: list[OSError | None] = [None]
        if self.runtime.is_first:
            try:
                _name(save.draft, final, save.manifest, save.milestone)
                for old in retire_old(self.folder, self.keep):  # its files take long to delete where they are large
                    self._deleting.append(threading.Thread(target=shutil.rmtree, args=(old, True)))
                    self._deleting[-1].start()
            except OSError as error:
                failure = [error]
        dist.broadcast_object_list(failure, src=0)
        if failure[0] is not None:
            raise failure[0]
        return final

    def _draft(self, step: int) -> Path:
        """A new folder, unlike any that a process of an earlier start may still write to."""
        name = [f".{step_folder(step)}.{time.time_ns():x}.tmp"]
        dist.broadcast_object_list(name, src=0)
        draft = self.folder / name[0]
        if self.runtime.is_first:
            draft.mkdir(parents=True)
        dist.barrier()
        return draft

    def _require_space(self, state: dict) -> int:
        """All ranks stop together, before anything is written, when the disk cannot hold the checkpoint. Returns its bytes."""
        needed = torch.tensor(float(stored_bytes(state)), dtype=torch.float64, device=active().device)
        dist.all_reduce(needed)
        free = torch.tensor(float(shutil.disk_usage(self.folder).free), dtype=torch.float64, device=needed.device)
        dist.all_reduce(free, op=dist.ReduceOp.MIN)
        if free.item() < needed.item():
            raise PlatformError(
                str(self.folder), f"{free.item() / 1e6:.1f} MB free", f"up to {needed.item() / 1e6:.1f} MB for one checkpoint",
                "make room and run the same command again; earlier checkpoints are intact",
            )
        return int(needed.item())

    def _failed(self, error: BaseException) -> UserError:
        save, self._under_way = self._under_way, None
        if self.runtime.is_first:
            shutil.rmtree(save.draft, ignore_errors=True)
        told = [self._explain(error, self.folder / step_folder(save.info.step))]
        if isinstance(error, CheckpointException):  # raised on all ranks, but only the first was told what failed
            dist.broadcast_object_list(told, src=0)
        return told[0]

    def _explain(self, error: BaseException, checkpoint: Path) -> UserError:
        """Only a disk without room is the user's to put right; after anything else starting the stage again is right."""
        text = str(error).strip() or "no reason given"
        full = any(f"[Errno {number}]" in text for number in FULL)
        kind, todo = (PlatformError, "make room on the disk and run the same command again") if full else (
            SaveError, "the same command continues; if this comes again, look at the memory of the machine (dmesg) and at its storage")
        free = shutil.disk_usage(self.folder).free
        return kind(
            f"{checkpoint}, saving", f"{type(error).__name__}: {text.splitlines()[-1][:300]} ({free / 1e6:.0f} MB free)",
            "a checkpoint written whole", f"{todo}; earlier checkpoints are intact",
        )


def _name(draft: Path, final: Path, manifest: dict, milestone: bool) -> None:
    """Rank 0: writes the manifest over the finished files and gives the folder its name."""
    known = gather_digests(draft)
    files = digest_files(draft, known)
    for name, entry in files.items():
        if "items" not in entry:  # what rank 0 wrote beside the tensors; those were flushed by their writers
            sync(draft / name)
    write_json(draft / MANIFEST, seal(manifest | {"files": files}))
    if milestone:    # not in the manifest: whoever takes the mark away lets the checkpoint go, it is still what was written
        (draft / MILESTONE).touch()
    sync(draft)
    if final.exists():
        remove(final)
    draft.replace(final)
    sync(final.parent)
