"""NVIDIA GPUs: everything upstream as released, nothing replaced."""

import torch

from glm.errors import PlatformError
from glm.platform.interface import Platform, shared_memory_folder
from glm.platform.kernels import apex


def platform(local_rank: int = 0) -> Platform:
    """The GPU of this rank. Raises PlatformError when torch sees none."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA (a CPU build)"
        raise PlatformError(
            "recipe key platform: cuda",
            f"no usable CUDA device; torch {torch.__version__} was built for {built}",
            "at least one NVIDIA GPU that torch can use",
            "check `nvidia-smi` and the driver, or choose a hardware file with platform: host",
        )
    if local_rank >= torch.cuda.device_count():
        raise PlatformError(
            "launcher.ranks_per_node",
            f"rank {local_rank} of this node, but {torch.cuda.device_count()} CUDA devices",
            "one device for each rank of a node",
            "lower launcher.ranks_per_node in the hardware file",
        )
    torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank)
    return Platform(
        name="cuda",
        backend="nccl",
        device=device,
        prepare_megatron=lambda: None,
        peak_memory_bytes=lambda: torch.cuda.max_memory_allocated(device),
        rng_state=lambda: torch.cuda.get_rng_state(device),
        set_rng_state=lambda state: torch.cuda.set_rng_state(state, device),
        fully_deterministic=False,
        adds_gradients=apex().adds_gradients,
        memory_folder=shared_memory_folder(),
    )
