"""Metrics to Weights & Biases. The only file that imports wandb, and only for a recipe that asks for it."""

from pathlib import Path

from glm.errors import PlatformError
from glm.metrics.read import as_number
from glm.recipe import sections


class WandbSink:
    """One wandb run a stage, grouped by the run's name, files in RUN/wandb. ``offline`` contacts nobody.

    wandb keeps its own step counter and never goes back, so ours is a metric of its own that everything is drawn against:
    after a resume the repeated steps lie on top of the old ones. Raises PlatformError when wandb is missing or refuses to start.
    """

    def __init__(self, run_folder: Path, stage: str, logging: sections.Logging, config: dict | None):
        try:
            import wandb
        except ImportError as error:
            raise PlatformError(
                where=f"logging.wandb of stage {stage}", found=f"wandb cannot be imported: {error}",
                expected="the wandb package", todo="pip install wandb, or set logging.wandb=off",
            ) from error
        run_folder = Path(run_folder).resolve()
        run_folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=logging.project, group=run_folder.name, name=f"{run_folder.name}/{stage}", job_type=stage,
                dir=str(run_folder), mode=logging.wandb, config=config or {},
                settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
            )
        except (wandb.errors.Error, OSError) as error:
            raise PlatformError(
                where=f"logging.wandb={logging.wandb} of stage {stage}", found=f"wandb did not start: {error}",
                expected="a wandb run", todo="run `wandb login`, or set logging.wandb=offline",
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def line(self, step: int, metrics: dict) -> None:
        """Numbers and strings; the expert loads stay in metrics.jsonl, wandb has no use for nested lists."""
        flat = {name: value for name, value in metrics.items() if as_number(value) is not None or isinstance(value, str)}
        self._run.log({"step": step, **flat})

    def close(self) -> None:
        """Ends the run. wandb writes from a process of its own, so the last bytes may reach RUN/wandb a moment later."""
        self._run.finish()
