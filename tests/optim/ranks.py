"""Real ranks over gloo: processes that stay, so that many cases pay for one start."""

import gc
import multiprocessing
import traceback
import warnings
from pathlib import Path

from glm import platform


class Ranks:
    """``ranks(layout, function, *args)`` calls ``function`` on every rank, divided by ``layout``; results in rank order."""

    def __init__(self, count: int, folder: Path):
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, str(folder / "store"), theirs))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, layout: dict[str, int], function, *args) -> list:
        for pipe in self._pipes:
            pipe.send((layout, function, args))
        replies = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(120), f"rank {rank} does not answer"
            replies.append(pipe.recv())
        failed = [f"rank {rank}:\n{reply}" for rank, (done, reply) in enumerate(replies) if not done]
        assert not failed, "\n".join(failed)
        return [reply for _, reply in replies]

    def close(self) -> None:
        for process in self._processes:  # leaving dozens of process groups in order takes seconds, and nothing is left to do
            process.kill()
            process.join()


def divide(layout: dict[str, int]) -> None:
    """Makes megatron's process groups for ``layout`` (tp, pp, vpp, cp, ep, etp; 1 where not named)."""
    from megatron.core import parallel_state, tensor_parallel

    if parallel_state.model_parallel_is_initialized():
        _leave_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.get("tp", 1), pipeline_model_parallel_size=layout.get("pp", 1),
        virtual_pipeline_model_parallel_size=layout.get("vpp"),
        context_parallel_size=layout.get("cp", 1), expert_model_parallel_size=layout.get("ep", 1),
        expert_tensor_parallel_size=layout.get("etp", 1),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)


def _leave_groups() -> None:
    """Of the layout before: megatron forgets its groups, torch keeps them, and their threads wake up a hundred times a second."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.distributed import distributed_c10d

    parallel_state.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()


def _serve(rank: int, count: int, store: str, pipe) -> None:
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")  # pytest shows those of the first process
    torch.set_num_threads(1)
    platform.activate("host")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    while True:
        try:
            layout, function, args = pipe.recv()
        except EOFError:  # the parent is gone
            return
        try:
            divide(layout)
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
