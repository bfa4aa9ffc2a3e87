"""A stage's checkpoints: when one is due, what a start continues from, and the proof that it continues.

A start takes the newest checkpoint whose bytes are what was written; a bad one is set aside and named. It refuses another
recipe or tokenizer, computes the loss of a few held-out rows again that was computed when the checkpoint was made, and
compares the steps that an earlier start had already done with what they logged.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch.distributed as dist

from glm.checkpoint import store
from glm.checkpoint.identity import refuse_other_recipe, refuse_other_tokenizer, same_arithmetic, tokenizer_digest
from glm.checkpoint.manifest import read_manifest, step_folders, step_of
from glm.checkpoint.retention import set_aside
from glm.checkpoint.run_folder import RunFolder
from glm.checkpoint.writer import CheckpointWriter, Written
from glm.errors import CheckpointError, NumericsError
from glm.recipe.compose import dump_recipe
from glm.recipe.schema import ModelStageRecipe
from glm.runtime import Runtime
from glm.train.plan import Progress, whole_micro_batches
from glm.train.step import Trainer

LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
"""Largest relative difference of one loss computed under two layouts from the same weights, by the type of the parameters."""
REPLAYED = ("train/loss", "train/mtp_loss", "train/grad_norm")


@dataclass(frozen=True)
class Resumed:
    progress: Progress
    exact: bool
    """The same arithmetic made the checkpoint: what is computed again is equal bit for bit."""


class StageCheckpoints:
    """Every method is called by all ranks at the same step.

    ``held_out_loss``: mean loss of so many held-out rows under the weights as they are; None: nothing to prove a load with.
    ``guard_history``: what the refusal of steps goes by (glm.train.setbacks), kept with the checkpoint.
    """

    def __init__(self, recipe: ModelStageRecipe, folder: RunFolder, runtime: Runtime, trainer: Trainer,
                 held_out_loss: Callable[[int], float] | None = None, guard_history: Callable[[], dict] = dict):
        self.recipe, self.run, self.runtime, self.trainer, self._held_out_loss = recipe, folder, runtime, trainer, held_out_loss
        self.folder = folder.checkpoints(recipe.stage)
        self._tokenizer = tokenizer_digest(folder.tokenizer)
        self._writer = CheckpointWriter(self.folder, runtime, recipe.checkpoint.keep)
        self._guard_history = guard_history
        self._last = Progress(0, 0)
        self._saved: int | None = None    # the newest checkpoint's step, remembered: on a shared disk another node may not see it yet

    def restore(self) -> Resumed:
        """Continues from the stage's own newest good checkpoint; else starts from its parent's last, else from random weights.

        On the run clock the parent's optimizer state goes on too: pre- and mid-training are one run.
        Raises CheckpointError when checkpoints are there and none is good, or when they are of another recipe or tokenizer.
        """
        own = self._newest_good()
        if own is None:
            self._start_from_parent()
            return Resumed(Progress(0, 0), exact=True)
        manifest = read_manifest(own)
        notes = refuse_other_recipe(own, manifest, self.recipe)
        refuse_other_tokenizer(own, manifest, self._tokenizer)
        info = store.load(own, self.trainer.chunks, self.trainer.optimizer, verified=True)
        exact = same_arithmetic(manifest, self.recipe)
        self._say(*notes, f"{self.recipe.stage}: continues after step {info.step} from {own}")
        self._prove(own, manifest, exact)
        self._last, self._saved = Progress(step=info.step, stage_tokens=info.stage_tokens), info.step
        return Resumed(self._last, exact)

    def after_step(self, progress: Progress) -> Written | None:
        """Publishes what was written in the background, and begins the save that is due. Returns what is new on the disk."""
        before, self._last = self._last, progress
        written = self._writer.poll()
        every, milestone = self.recipe.checkpoint.every_steps, self._passed_milestone(before, progress)
        if milestone or every and progress.step % every == 0:
            written = self.begin(progress, milestone) or written
        return written

    def begin(self, progress: Progress, milestone: bool = False) -> Written | None:
        """Copies the state; it is on the disk after ``finish``, or after some later ``after_step``."""
        recipe = self.recipe
        info = store.CheckpointInfo(
            stage=recipe.stage, step=progress.step, stage_tokens=progress.stage_tokens,
            run_tokens=recipe.run_tokens_before + progress.stage_tokens, rotary_base=recipe.rotary_base, megatron=recipe.megatron,
            guard=self._guard_history(),
        )
        about = {"recipe": dump_recipe(recipe), "tokenizer": self._tokenizer, "probe": self._probe()}
        before = self._writer.begin(
            info, recipe.model, self.trainer.chunks, self.trainer.optimizer, milestone=milestone, about=about,
        )
        self._saved = progress.step
        return before if recipe.checkpoint.asynchronous else self._writer.finish()

    def finish(self) -> Written | None:
        """Waits for the save under way."""
        return self._writer.finish()

    def close(self, progress: Progress) -> Written | None:
        """The state at ``progress`` is on the disk when this returns."""
        written = self._writer.finish()
        if progress.step != self._saved:
            self.begin(progress)
            written = self._writer.finish() or written
        return written

    def _passed_milestone(self, before: Progress, after: Progress) -> bool:
        every = self.recipe.checkpoint.milestone_tokens
        start = self.recipe.run_tokens_before
        return every > 0 and (start + before.stage_tokens) // every < (start + after.stage_tokens) // every

    def _newest_good(self) -> Path | None:
        """The newest checkpoint that is whole. Those newer than it are set aside."""
        listed = [step_folders(self.folder) if self.runtime.is_first else []]
        dist.broadcast_object_list(listed, src=0)
        faults: list[tuple[Path, CheckpointError]] = []
        for checkpoint in reversed(listed[0]):
            fault = store.find_fault(checkpoint)
            if fault is None:
                self._set_aside(faults, checkpoint)
                return checkpoint
            faults.append((checkpoint, fault))
        if faults:
            listing = "\n            ".join(f"{fault.where}: {fault.found}, not {fault.expected}" for _, fault in faults)
            raise CheckpointError(
                str(self.folder), f"no checkpoint that is whole:\n            {listing}", "one that is as it was written",
                f"put a copy back, or make the stage anew: rm -r {self.run.stage(self.recipe.stage)}",
            )
        return None

    def _set_aside(self, faults: list[tuple[Path, CheckpointError]], good: Path) -> None:
        for bad, fault in faults:
            aside = set_aside(bad) if self.runtime.is_first else bad
            lost = step_of(bad) - step_of(good)
            self._say(
                f"{self.recipe.stage}: CHECKPOINT {bad.name} IS NOT WHAT WAS WRITTEN: {fault.where}\n"
                f"  found:    {fault.found}\n  expected: {fault.expected}\n"
                f"  done:     set aside as {aside}; {self.recipe.stage} continues from {good.name}, {lost} steps are lost and done again"
            )
        dist.barrier()

    def _start_from_parent(self) -> None:
        recipe = self.recipe
        if recipe.parent is None:
            return
        folder = self.run.checkpoints(recipe.parent)
        parent = store.newest_checkpoint(folder)
        if parent is None:
            raise CheckpointError(
                str(folder), "no checkpoint", f"one of stage {recipe.parent}, which {recipe.stage} starts from", f"run stage {recipe.parent} first",
            )
        fault = store.find_fault(parent)
        if fault is not None:  # an older one is not what the stage before ended with, and would be taken for it
            raise CheckpointError(
                fault.where, fault.found, fault.expected,
                f"rm {self.run.done(recipe.parent)} and run again: stage {recipe.parent} sets {parent.name} aside, continues from the "
                f"checkpoint before it, and {recipe.stage} starts from its end",
            )
        manifest = read_manifest(parent)
        refuse_other_tokenizer(parent, manifest, self._tokenizer)
        goes_on = recipe.schedule.clock == "run"
        store.load(parent, self.trainer.chunks, self.trainer.optimizer if goes_on else None, verified=True)
        if not goes_on:
            self.trainer.optimizer.masters_from_params()

    def _probe(self) -> dict | None:
        if self._held_out_loss is None:
            return None
        rows = whole_micro_batches(self.recipe)
        return {"rows": rows, "loss": self._held_out_loss(rows)}

    def _prove(self, checkpoint: Path, manifest: dict, exact: bool) -> None:
        """The weights in memory give the loss that they gave when they were saved."""
        probe = manifest.get("probe")
        if probe is None or self._held_out_loss is None:
            return
        if probe["rows"] % whole_micro_batches(self.recipe):
            self._say(f"{self.recipe.stage}: the loss of {probe['rows']} held-out rows cannot be computed again under this layout")
            return
        found, what = self._held_out_loss(probe["rows"]), f"loss of {probe['rows']} held-out rows"
        if not _near(found, probe["loss"], LOSS_TOLERANCE[self.recipe.precision.params]):
            raise CheckpointError(
                f"{checkpoint}: {what} after loading", repr(found), f"{probe['loss']!r}, as when it was saved",
                "what was loaded is not what was saved although its bytes are: compare the installed packages with those of then (glm doctor)",
            )
        if exact and found != probe["loss"]:
            self._say(f"{self.recipe.stage}: {what} after loading is {found!r}, not bit for bit the {probe['loss']!r} of the save")

    def _say(self, *lines: str) -> None:
        if self.runtime.is_first:
            for line in lines:
                print(line, file=sys.stderr if "CHECKPOINT" in line else sys.stdout, flush=True)


class Replay:
    """Steps that an earlier start had done after its last checkpoint, and their numbers: doing them again gives the same.

    ``recorded``: the dropped lines of the metric log; ``exact``: bit for bit, until a step differs; otherwise the first
    of them within LOSS_TOLERANCE, because later ones drift apart. Raises NumericsError beyond that.
    """

    def __init__(self, recipe: ModelStageRecipe, recorded: list[dict], exact: bool):
        self.recipe, self.exact = recipe, exact
        self._recorded = {line["step"]: line for line in recorded if REPLAYED[0] in line}
        self._first = True

    def compare(self, step: int, metrics: dict) -> None:
        expected = self._recorded.pop(step, None)
        if expected is None:
            return
        where = f"{self.recipe.stage}, step {step}, done before and now again after loading its checkpoint"
        loss, recorded = metrics[REPLAYED[0]], expected[REPLAYED[0]]
        if self._first and not _near(loss, recorded, LOSS_TOLERANCE[self.recipe.precision.params]):
            raise NumericsError(
                f"{where}: loss", repr(loss), f"{recorded!r}, as it was logged",
                "the state or the data of this step is not that of the first time: compare packages, machine and data with those of then",
            )
        differing = [
            f"{name} {metrics[name]!r}, not {expected.get(name)!r}" for name in REPLAYED
            if str(metrics[name]) != str(expected.get(name))    # the log holds a word for what is not finite; other floats read back as written
        ]
        if self.exact and differing:
            print(f"{where}: not bit for bit what was logged: {'; '.join(differing)}", file=sys.stderr, flush=True)
        self._first = False
        if differing:
            self._recorded.clear()


def _near(found: float, expected: object, tolerance: float) -> bool:
    """Numbers within the relative tolerance; whatever is no number (it is logged as a word) counts as equal to its like."""
    if not isinstance(expected, int | float):
        return str(found) == expected
    return abs(found - expected) <= tolerance * abs(expected)
