"""Where the engines of a rollout run: SGLang servers on this machine, started together and stopped together."""

from contextlib import contextmanager
from pathlib import Path

from glm.inference.server import EngineServer, ServerSpec
from glm.model.config import DTYPES
from glm.recipe.schema import RLRecipe


@contextmanager
def engines(recipe: RLRecipe, model_folder: Path, log_folder: Path, weight_version: int):
    """Starts ``engine.num_servers`` servers of the model in ``model_folder`` and yields them ready.

    ``weight_version`` is that of the folder's weights. They are gone when the block ends, and when this process ends in any way.
    """
    settings = recipe.engine
    servers = [
        EngineServer(
            ServerSpec(
                model_folder=model_folder,
                platform=recipe.platform,
                num_draft_steps=settings.speculative.num_steps,
                context_length=settings.context_length,
                max_running_requests=settings.max_running_requests,
                memory_fraction=settings.memory_fraction,
                seed=recipe.seed * 1000 + number,
                tp=settings.tp,
                dtype=str(DTYPES[recipe.precision.params]).removeprefix("torch."),
                weight_version=str(weight_version),
                extra=recipe.sglang,
            ),
            log_folder / f"engine_{number}.log",
        )
        for number in range(settings.num_servers)
    ]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready(settings.start_timeout_seconds)
        yield servers
    finally:
        for server in servers:
            server.stop()
