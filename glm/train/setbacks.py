"""What a stage remembers of refused steps: their data, and how often it went back. The same on all ranks.

    RUN/stages/STAGE/skipped.jsonl     a refused step a line: why, and which rows of the stage it had
    RUN/stages/STAGE/rollbacks.json    a rollback an entry: from where, to which step, the rows left out since, and the refused steps'
                                       records, which leave skipped.jsonl with the path that was given up

A rollback is a record and an exit: the next start of the stage finds the record, removes the checkpoints of the path that was
given up, goes on from what is left, and leaves the recorded rows out. So a kill at any moment changes nothing.
"""

import json
from collections import Counter
from dataclasses import replace
from typing import Callable

import torch
import torch.distributed as dist

from glm.checkpoint import store
from glm.checkpoint.retention import remove
from glm.checkpoint.run_folder import RunFolder, write_atomically, write_json
from glm.data.batches import Batches, Row
from glm.errors import ROLLBACK_CODE, CheckpointError, NumericsError, StageStopped
from glm.platform import active
from glm.recipe.schema import TrainRecipe
from glm.runtime import Runtime
from glm.train import guard
from glm.train.plan import Progress, StepPlan
from glm.train.step import StepOutcome


class Setbacks:
    """Create it before the stage's checkpoints are looked at. Collective over all ranks."""

    def __init__(self, recipe: TrainRecipe, folder: RunFolder, runtime: Runtime):
        self.recipe, self.folder, self.is_first = recipe, folder, runtime.is_first
        self.history = guard.History()
        told = [self._read_rollbacks() if self.is_first else None]
        dist.broadcast_object_list(told, src=0)
        self.rollbacks: list[dict] = told[0]
        if self.is_first:
            self._remove_given_up()
        dist.barrier()

    def resume(self, progress: Progress, finish_save: Callable[[], object]) -> None:
        """Takes over what the checkpoint the stage goes on from knew, and forgets the steps after it.

        ``finish_save`` waits for the save under way, so that where a rollback goes does not depend on how quick the disk is.
        """
        self._finish_save = finish_save
        if progress.step:
            checkpoint = self.folder.checkpoints(self.recipe.stage) / store.step_folder(progress.step)
            self.history = guard.History.of(store.read_info(checkpoint)[0].guard)
        self.history = replace(self.history, rollbacks=len(self.rollbacks))
        if self.is_first:
            self._write_skipped([record for record in self._read_skipped() if record["step"] <= progress.step])

    def of_this_path(self, logged: list[dict]) -> list[dict]:
        """Of an earlier start's lines those of steps that will be done again with the same data."""
        return [line for line in logged if line.get("fault/rollbacks", 0) == len(self.rollbacks)]

    def rows(self, batches: Batches, first: int, count: int) -> list[Row]:
        """Rows ``first`` ... of the stage, without those that a rollback left out."""
        return [row for piece in self._pieces(first, count) for row in batches.rows(*piece)]

    def refusal(self, metrics: dict[str, float], grad_norm: float) -> str | None:
        """Why the step must not change the model. Ranks agree: what one refuses, all do."""
        own = guard.refusal(self.history, self.recipe.guard, metrics["loss"], grad_norm)
        refused = torch.tensor(own is not None, dtype=torch.int32, device=active().device)
        dist.all_reduce(refused, op=dist.ReduceOp.MAX)
        return own or ("another rank refused it" if refused.item() else None)

    def consumed(self, batches: Batches, progress: Progress) -> dict[str, float]:
        """What the stage has read of each source so far, to log; data left out after a rollback was not read."""
        taken = batches.ledger_of(self._pieces(0, progress.stage_tokens // self.recipe.sequence_length))
        return {f"data/{what}/{name}": getattr(source, what) for name, source in taken.items() for what in ("tokens", "epochs")}

    def after(self, plan: StepPlan, outcome: StepOutcome, batches: Batches) -> dict[str, int]:
        """Notes the step. Returns what to log of it.

        Raises StageStopped when the stage must go back, NumericsError when it went back too often.
        """
        step, settings = plan.step + 1, self.recipe.guard
        self.history = guard.after(
            self.history, settings, step, outcome.metrics["loss"], outcome.grad_norm, outcome.refused is not None,
        )
        if outcome.refused is not None:
            if self.is_first:
                self._record(plan, outcome, batches)
            if guard.must_roll_back(self.history, settings):
                self._roll_back(step)
        told = {"fault/skipped_steps": len(self.history.skipped), "fault/rollbacks": len(self.rollbacks)}
        return told if any(told.values()) else {}

    def _pieces(self, first: int, count: int) -> list[tuple[int, int]]:
        return guard.leave_out(first, count, [tuple(rows) for rollback in self.rollbacks for rows in rollback["rows"]])

    def _record(self, plan: StepPlan, outcome: StepOutcome, batches: Batches) -> None:
        pieces = self._pieces(plan.stage_tokens // plan.sequence_length, plan.num_sequences)
        sources = sum((Counter(batches.sources(*piece)) for piece in pieces), Counter())
        record = {
            "step": plan.step + 1, "reason": outcome.refused, "loss": str(outcome.metrics["loss"]), "grad_norm": str(outcome.grad_norm),
            "rows": [[first, first + count - 1] for first, count in pieces], "sources": dict(sources),
            "stage_tokens": [plan.stage_tokens, plan.stage_tokens + plan.tokens],
        }
        self._write_skipped([*self._read_skipped(), record])
        ranges = ", ".join(f"{first} to {last}" for first, last in record["rows"])
        names = ", ".join(f"{name} {rows}" for name, rows in sources.items())
        print(
            f"{self.recipe.stage}: step {record['step']} was skipped: {outcome.refused}; the model is as before, its data counts as read: "
            f"rows {ranges} of the stage ({names}), see {self.folder.skipped(self.recipe.stage)}", flush=True,
        )

    def _roll_back(self, step: int) -> None:
        stage, settings = self.recipe.stage, self.recipe.guard
        recent = guard.recent_rollbacks(self.rollbacks, settings, step)
        limit = f"at most {settings.rollback_limit} rollbacks within {settings.rollback_window} steps"
        skipped = self.history.skipped
        many = f"{len(skipped)} steps of the last {settings.window} were skipped ({', '.join(map(str, skipped))})"
        if recent >= settings.rollback_limit:
            raise NumericsError(
                f"{stage}, step {step}", f"{many}, after {recent} rollbacks", f"{limit} (guard.rollback_limit, guard.rollback_window)",
                f"look at the data named in {self.folder.skipped(stage)} and in rollbacks.json beside it, and at the curves before; then raise guard.rollback_limit and "
                "run again, or lower schedule.peak_lr in a run folder of its own",
            )
        self._finish_save()
        if self.is_first:
            to = guard.rollback_target(store.checkpoint_steps(self.folder.checkpoints(stage)), skipped[0])
            bad = [record for record in self._read_skipped() if record["step"] in skipped and record["step"] > to]
            entry = {
                "from_step": step, "to_step": to, "rows": [rows for record in bad for rows in record["rows"]],
                "reasons": [record["reason"] for record in bad], "skipped": bad,
            }
            write_json(self.folder.rollbacks(stage), [*self.rollbacks, entry])
            where = f"the checkpoint of step {to}" if to else "the beginning of the stage"
            print(f"{stage}: {many}: goes back to {where} and leaves their data out", flush=True)
        dist.barrier()
        raise StageStopped(ROLLBACK_CODE, f"rollback {recent + 1}, {limit}; the same command continues")

    def _remove_given_up(self) -> None:
        """Checkpoints of a path that was given up: later than where a rollback went, and made before it.

        One that cannot be read stays: whoever looks for the newest good checkpoint sets it aside and says so.
        """
        if not self.rollbacks:
            return
        folder = self.folder.checkpoints(self.recipe.stage)
        for step in store.checkpoint_steps(folder):
            checkpoint = folder / store.step_folder(step)
            try:
                known = store.read_info(checkpoint)[0].guard.get("rollbacks", 0)
            except CheckpointError:
                continue
            if any(step > rollback["to_step"] for rollback in self.rollbacks[known:]):
                remove(checkpoint)

    def _read_rollbacks(self) -> list[dict]:
        path = self.folder.rollbacks(self.recipe.stage)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def _read_skipped(self) -> list[dict]:
        path = self.folder.skipped(self.recipe.stage)
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def _write_skipped(self, records: list[dict]) -> None:
        path = self.folder.skipped(self.recipe.stage)
        if records or path.exists():
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
