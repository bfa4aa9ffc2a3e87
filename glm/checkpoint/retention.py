"""Which checkpoints of a stage stay, and how one leaves: by a rename first, so that no half of one keeps its name."""

import shutil
import time
from pathlib import Path

from glm.checkpoint.manifest import checkpoint_steps, step_folder

MILESTONE = "milestone"
"""A file of this name in a checkpoint keeps it for ever. Put one there by hand to keep any other."""
_LEAVING = ".leaving.tmp"


def retire_old(folder: Path, keep: int) -> list[Path]:
    """Takes their names from the oldest beyond ``keep``; milestones neither go nor count. Returns what is left to delete."""
    steps = [step for step in checkpoint_steps(folder) if not (folder / step_folder(step) / MILESTONE).exists()]
    return [_retire(folder / step_folder(step)) for step in steps[:-keep]]


def remove(checkpoint: Path) -> None:
    shutil.rmtree(_retire(checkpoint))


def _retire(checkpoint: Path) -> Path:
    leaving = checkpoint.with_name(f".{checkpoint.name}{_LEAVING}")
    shutil.rmtree(leaving, ignore_errors=True)
    return checkpoint.rename(leaving)


def clear_drafts(folder: Path) -> None:
    """Takes away what a killed save or removal left behind."""
    for draft in folder.glob(".step_*.tmp"):
        shutil.rmtree(draft, ignore_errors=True)


def set_aside(checkpoint: Path) -> Path:
    """Renames a bad checkpoint so that nobody continues from it and everybody can look at it. Returns where it is."""
    aside = checkpoint.with_name(f"bad_{checkpoint.name}")
    while aside.exists():
        aside = checkpoint.with_name(f"bad_{checkpoint.name}.{time.time_ns():x}")
    return checkpoint.rename(aside)
