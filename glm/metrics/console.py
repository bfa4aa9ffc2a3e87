"""What a person watching a run sees: a progress bar on a terminal, plain lines in a file."""

import sys
import time

from glm.metrics.read import as_number

# Fixed order: the eye finds a number where it was in the line above. (metric, label, format)
_TRAIN = (
    ("train/stage_tokens", "tokens", "tokens"), ("train/loss", "loss", ".4f"), ("train/mtp_loss", "mtp", ".4f"), ("mtp/accuracy", "mtp hits", ".3f"),
    ("train/lr", "lr", ".2e"), ("train/grad_norm", "grad", ".3f"), ("train/tokens_per_second", "tok/s", "tokens"),
    ("train/mfu", "MFU", ".1%"), ("balance/max_over_mean", "balance", ".2f"),
)
_RL = (
    ("rl/reward", "reward", ".3f"), ("rl/response_tokens", "reply tokens", ".1f"), ("rl/acceptance_length", "accepted", ".2f"),
    ("rl/logprob_difference_mean", "logprob diff", ".1e"), ("rl/entropy", "entropy", ".3f"), ("rl/grad_norm", "grad", ".3f"),
    ("rl/mtp_loss", "mtp", ".4f"), ("rl/groups_dropped", "dropped", ".0f"), ("rl/rollout_seconds", "rollout s", ".1f"),
    ("rl/train_seconds", "train s", ".1f"), ("rl/sync_seconds", "sync s", ".1f"),
)
_PROGRESS_ORDER = _TRAIN + _RL


def short_count(number: float) -> str:
    """1234567 -> ``1.23M``: three digits are enough to read along."""
    for suffix, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{suffix}"
    return f"{number:.0f}" if abs(number) >= 100 or number == int(number) else f"{number:.3g}"


def describe(metrics: dict) -> str:
    """``loss 2.3456  mtp 2.5000 ...`` of one step's metrics; empty when none of them is shown."""
    words = []
    for name, label, form in _PROGRESS_ORDER:
        value = as_number(metrics.get(name))
        if value is not None:
            words.append(f"{label} {short_count(value) if form == 'tokens' else format(value, form)}")
    return "  ".join(words)


def describe_event(metrics: dict) -> str:
    """A sentence for a validation or an evaluation; empty for an ordinary step."""
    words = []
    loss = as_number(metrics.get("validation/loss"))
    if loss is not None:
        words.append(f"validation loss {loss:.4f}")
    if "eval/phase" in metrics:
        words.append(f"held-out accuracy {metrics['eval/phase']}:")
        for kind in ("sampled", "greedy"):
            accuracy, error = (as_number(metrics.get(f"eval/{kind}_{what}")) for what in ("accuracy", "standard_error"))
            if accuracy is not None:
                words.append(f"{kind} {100 * accuracy:.1f}%" + (f" ± {100 * error:.1f}" if error is not None else ""))
    return "  ".join(words)


class Console:
    """Shows the lines of one stage. Standard output decides the form: a terminal gets a bar, anything else plain lines."""

    def __init__(self, stage: str, total_steps: int | None, stream=None):
        self.stage, self.total_steps, self.stream = stage, total_steps, stream or sys.stdout
        self._bar = self._task = None
        self._last_step, self._last_text, self._started = 0, "", time.monotonic()
        if self.stream.isatty():
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[text]}", markup=False), console=RichConsole(file=self.stream), transient=True,
            )
            self._task = self._bar.add_task(stage, total=total_steps, text="")
            self._bar.start()

    def line(self, step: int, metrics: dict) -> None:
        """Prints one line that stays. On a terminal only events stay; the steps are in the bar."""
        event = describe_event(metrics)
        if self._bar:
            if event:
                self._bar.console.print(f"{self._where(step)}  {event}", markup=False, highlight=False)
            return
        text = "  ".join(part for part in (describe(metrics), event) if part)
        if text:
            print(f"{self._where(step)}  {text}", file=self.stream, flush=True)

    def advance(self, step: int, metrics: dict) -> None:
        """Moves the bar; every step, whether or not its line is written."""
        self._last_step, self._last_text = step, describe(metrics) or self._last_text
        if self._bar:
            self._bar.update(self._task, completed=step, text=self._last_text)

    def close(self) -> None:
        """Replaces the bar by one line that stays."""
        if self._bar:
            self._bar.stop()
            self._bar = None
            seconds = time.monotonic() - self._started
            print(f"{self._where(self._last_step)}  {self._last_text}  ({seconds:.0f} s)", file=self.stream, flush=True)

    def _where(self, step: int) -> str:
        return f"{self.stage} {step}/{self.total_steps}" if self.total_steps else f"{self.stage} {step}"
