"""Which checkpoint a path means: one itself, the newest of a folder of them, or that of a run's last finished stage."""

from dataclasses import dataclass
from pathlib import Path

from glm.checkpoint import manifest
from glm.checkpoint.run_folder import RunFolder
from glm.errors import CheckpointError


@dataclass(frozen=True)
class Source:
    checkpoint: Path
    tokenizer: Path | None
    """The run's tokenizer, if it has one."""


def find_source(path: Path, stage: str | None = None) -> Source:
    """The checkpoint at ``path``, the newest in the folder ``path``, or in the run ``path`` the newest one of ``stage``.

    Without ``stage``: of the training stage that finished last. Raises CheckpointError when there is none.
    """
    path = Path(path)
    if (path / manifest.MANIFEST).is_file():
        return Source(path, _tokenizer(_run_of(path)))
    if newest := manifest.newest_checkpoint(path):  # the folder from_hf wrote, or a stage's checkpoints
        return Source(newest, _tokenizer(_run_of(newest)))
    run = RunFolder(path)
    stages = sorted(folder.name for folder in (path / "stages").glob("*") if manifest.checkpoint_steps(run.checkpoints(folder.name)))
    if not stages:
        raise CheckpointError(
            str(path), "neither a checkpoint nor a run with checkpoints",
            "RUN, or RUN/stages/STAGE/checkpoints/step_00000120", "correct the path",
        )
    if stage is None:
        finished = [name for name in stages if run.done(name).is_file()]
        if not finished:
            raise CheckpointError(
                str(path), f"no finished training stage; checkpoints of: {', '.join(stages)}", "a finished one",
                "finish the run, or name a stage (--stage)",
            )
        stage = max(finished, key=lambda name: run.done(name).stat().st_mtime_ns)
    elif stage not in stages:
        raise CheckpointError(f"{path}: stage {stage}", "no checkpoint", f"one of {', '.join(stages)}", "correct --stage")
    return Source(manifest.newest_checkpoint(run.checkpoints(stage)), _tokenizer(path))


def _run_of(checkpoint: Path) -> Path:
    """RUN of RUN/stages/STAGE/checkpoints/step_N; for a checkpoint elsewhere a folder without a tokenizer."""
    parents = checkpoint.absolute().parents
    return parents[3] if len(parents) > 3 and parents[2].name == "stages" else checkpoint


def _tokenizer(run: Path) -> Path | None:
    folder = RunFolder(run).tokenizer
    return folder if (folder / "tokenizer.json").is_file() else None
