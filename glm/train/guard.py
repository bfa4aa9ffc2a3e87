"""Whether a step's gradient may change the model, judged by the losses and gradient norms of the steps before it. Pure.

A step is refused when its loss or gradient norm is not finite, or far above what the last healthy steps had. Its data counts as
read, its tokens as passed; parameters, optimizer state and router biases stay as they were. Too many refused steps within a
window are no accident of the data: the stage goes back to the checkpoint before the first of them, and leaves their data out.
Everything the decision needs is a ``History``, which a checkpoint carries, so that a resumed run decides the same.
"""

import math
import statistics
from dataclasses import asdict, dataclass, replace

from glm.recipe.sections import Guard


@dataclass(frozen=True)
class History:
    """The last healthy steps, and the steps that were refused lately."""

    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()
    skipped: tuple[int, ...] = ()
    """Numbers of refused steps; the first step of a stage is 1."""
    rollbacks: int = 0
    """How many times the stage had gone back when this history began."""

    @classmethod
    def of(cls, saved: dict) -> "History":
        """What ``to_json`` gave; a checkpoint without one starts anew."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})

    def to_json(self) -> dict:
        return asdict(self)


def refusal(history: History, guard: Guard, loss: float, grad_norm: float) -> str | None:
    """Why the step must not change the model; None for a healthy one."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"the gradient norm is {grad_norm}"
    if len(history.losses) < guard.history:
        return None
    number = len(history.losses)
    mean, spread, largest = statistics.fmean(history.losses), statistics.pstdev(history.losses), max(history.losses)
    if guard.loss_sigmas and loss > mean + guard.loss_sigmas * spread and loss > guard.loss_factor * largest:
        return f"the loss {loss:.4f} is far above those of the last {number} steps: mean {mean:.4f}, deviation {spread:.4f}, largest {largest:.4f}"
    usual = statistics.median(history.grad_norms)
    if guard.grad_norm_factor and grad_norm > guard.grad_norm_factor * usual:
        return f"the gradient norm {grad_norm:.4g} is more than {guard.grad_norm_factor:g} times the median {usual:.4g} of the last {number} steps"
    return None


def after(history: History, guard: Guard, step: int, loss: float, grad_norm: float, refused: bool) -> History:
    """The history that the step following ``step`` is judged by; refused steps leave it no number."""
    skipped = tuple(one for one in history.skipped if one > step - guard.window)
    if refused:
        return replace(history, skipped=(*skipped, step))
    keep = guard.window - 1
    return replace(
        history, skipped=skipped, losses=(*history.losses[-keep:], loss) if keep else (loss,),
        grad_norms=(*history.grad_norms[-keep:], grad_norm) if keep else (grad_norm,),
    )


def must_roll_back(history: History, guard: Guard) -> bool:
    return len(history.skipped) >= guard.skip_limit


def recent_rollbacks(rollbacks: list[dict], guard: Guard, step: int) -> int:
    """How many of them began less than ``rollback_window`` steps before ``step``, or ahead of it, where the stage has been before."""
    return sum(rollback["from_step"] > step - guard.rollback_window for rollback in rollbacks)


def rollback_target(checkpoints: list[int], first_skipped: int) -> int:
    """The newest checkpoint before the first refused step; else the oldest there is; 0, the stage's beginning, without any."""
    before = [step for step in checkpoints if step < first_skipped]
    return max(before) if before else min(checkpoints, default=0)


def leave_out(first: int, count: int, excluded: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Rows ``first`` ... of the stage as they are numbered when ``excluded`` [(first, last)] are not there.

    Returns [(first, count)] of contiguous rows of the data. Excluded ranges must not overlap.
    """
    start = first
    pieces: list[tuple[int, int]] = []
    for begin, end in sorted(excluded):
        if begin <= start:
            start += end - begin + 1
        elif begin < start + count:
            pieces.append((start, begin - start))
            count -= begin - start
            start = end + 1
    return [*pieces, (start, count)] if count else pieces
