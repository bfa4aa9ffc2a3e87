"""Process groups, seeds and threads of one rank."""

import datetime
import random
from dataclasses import dataclass

import numpy
import torch
import torch.distributed as dist

from glm.errors import PlatformError
from glm.platform import active
from glm.platform.ranks import place
from glm.recipe.check import refuse_unproved
from glm.recipe.schema import StageRecipe
from glm.recipe.sections import Layout


@dataclass(frozen=True)
class Runtime:
    """Where this rank stands. Sizes and ranks are of the layout's groups."""

    rank: int
    world_size: int
    dp_rank: int
    """Of the ranks that read different sequences."""
    dp_size: int

    @property
    def is_first(self) -> bool:
        """Rank 0 writes files and draws progress."""
        return self.rank == 0


def start(recipe: StageRecipe) -> Runtime:
    """Joins the process group, divides the ranks by the recipe's layout and seeds every generator.

    MASTER_ADDR and MASTER_PORT are read by torch.distributed; alone (world size 1) a rank needs neither.
    Raises PlatformError for a layout this release cannot vouch for.
    """
    from megatron.core import parallel_state, tensor_parallel

    layout = recipe.layout
    rank, world_size = place().rank, place().world_size
    refuse_unproved(recipe)
    if world_size != recipe.world_size:
        raise PlatformError(
            f"{recipe.stage}: launcher", f"{world_size} ranks were started", f"{recipe.world_size}, as the recipe says",
            "start the stage with `glm run`, or with the command that `glm run --dry-run` prints",
        )
    torch.set_num_threads(recipe.launcher.threads_per_rank)
    if not dist.is_initialized():
        timeout = datetime.timedelta(seconds=recipe.launcher.timeout_seconds)
        if world_size == 1:
            dist.init_process_group(active().backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(active().backend, rank=rank, world_size=world_size, timeout=timeout)
    if not parallel_state.model_parallel_is_initialized():
        divide_ranks(layout, timeout_seconds=recipe.launcher.timeout_seconds)
    random.seed(recipe.seed)
    numpy.random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(recipe.seed)
    if recipe.deterministic:
        # megatron writes every buffer it allocates; filling them first costs 4 % of a step on the host
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True, warn_only=not active().fully_deterministic)
    return Runtime(
        rank=rank,
        world_size=world_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
    )


def divide_ranks(layout: Layout, *, gloo: bool = True, timeout_seconds: float = 1800) -> None:
    """megatron's process groups for ``layout`` over the ranks of the process group that is there.

    ``gloo``: also those groups over gloo that megatron keeps beside the device's own. ``timeout_seconds``: of every group.
    """
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=gloo,
        distributed_timeout_minutes=timeout_seconds / 60,
    )


def stop() -> None:
    """Leaves the process group, after all ranks got here."""
    from megatron.core import parallel_state

    if dist.is_initialized():
        dist.barrier()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
