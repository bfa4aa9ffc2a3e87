"""The folder of one run: every path in it is named here and nowhere else."""

import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """``RUN/``: tokenizer/ data/ export/ metrics.jsonl report.html and stages/STAGE/."""

    root: Path

    @classmethod
    def of(cls, recipe) -> "RunFolder":
        """The folder a stage's recipe names."""
        return cls(Path(recipe.run_folder))

    @property
    def metrics(self) -> Path:
        """One JSON object a line, from every stage."""
        return self.root / "metrics.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def data(self) -> Path:
        """Tokenized sources, shared by the stages."""
        return self.root / "data"

    @property
    def prepared(self) -> Path:
        """{"NAME/BUCKET": {"corpus": name in ``data``, "documents", "tokens"}} of what the prepare stages made."""
        return self.data / "prepared.json"

    @property
    def export(self) -> Path:
        """The Hugging Face folder of the finished model."""
        return self.root / "export"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def schedule(self) -> Path:
        """The picture `glm show --schedule` draws."""
        return self.root / "schedule.svg"

    def stage(self, name: str) -> Path:
        return self.root / "stages" / name

    def recipe(self, stage: str) -> Path:
        """The resolved recipe the stage runs with."""
        return self.stage(stage) / "recipe.json"

    def checkpoints(self, stage: str) -> Path:
        return self.stage(stage) / "checkpoints"

    def samples(self, stage: str) -> Path:
        """Sample dialogues, one JSON object a line."""
        return self.stage(stage) / "samples.jsonl"

    def skipped(self, stage: str) -> Path:
        """Refused steps and their data, one JSON object a line."""
        return self.stage(stage) / "skipped.jsonl"

    def rollbacks(self, stage: str) -> Path:
        """How often the stage went back, to where, and the rows it leaves out since."""
        return self.stage(stage) / "rollbacks.json"

    def restarts(self, stage: str) -> Path:
        """Why `glm run` started the stage again, one JSON object a line."""
        return self.stage(stage) / "restarts.jsonl"

    def stop_request(self, stage: str) -> Path:
        """Whoever puts this file there asks the stage to save and to stop, as SIGTERM does."""
        return self.stage(stage) / "stop"

    def requeue(self, stage: str) -> Path:
        """Written when the stage saved and stopped because it was asked to; gone when it goes on."""
        return self.stage(stage) / "requeue.json"

    def exit(self, stage: str) -> Path:
        """Written by the first rank that ends with another code than 0: srun and torchrun do not pass it on."""
        return self.stage(stage) / "exit.json"

    def hang(self, stage: str, rank: int) -> Path:
        """Where a rank stood when it had waited too long."""
        return self.stage(stage) / f"hang_rank_{rank}.txt"

    def data_worker_log(self, stage: str, rank: int, worker: int) -> Path:
        return self.stage(stage) / "logs" / f"data_worker_{rank}_{worker}.log"

    def done(self, stage: str) -> Path:
        """Written last; holds the fingerprint of the recipe that was finished."""
        return self.stage(stage) / "done.json"


def sync(path: Path) -> None:
    """Returns when the file's bytes, or the folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Writes beside ``path``, flushes to disk, renames: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with draft.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    draft.replace(path)


def write_json(path: Path, value: object) -> None:
    write_atomically(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
