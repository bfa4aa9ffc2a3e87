"""What the rest of the code may ask of a device."""

import os
from dataclasses import dataclass
from typing import Callable

import torch

from glm.errors import PlatformError
from glm.platform.kernels import refuse_unrelated_apex


@dataclass(frozen=True)
class Platform:
    """One kind of device. Two exist: ``host`` (CPU, gloo) and ``cuda`` (GPU, NCCL)."""

    name: str
    backend: str
    """torch.distributed backend."""
    device: torch.device
    prepare_megatron: Callable[[], None]
    """Makes megatron-core importable and usable on this device; nothing to do on CUDA."""
    peak_memory_bytes: Callable[[], int]
    """Largest memory of this process so far: device memory on CUDA, resident memory on the host."""
    rng_state: Callable[[], torch.Tensor]
    set_rng_state: Callable[[torch.Tensor], None]
    fully_deterministic: bool
    """Every operation of training has a deterministic form here; where not, torch warns instead of refusing."""
    adds_gradients: bool
    """A kernel that adds a bf16 weight gradient to an fp32 buffer is installed (NVIDIA apex)."""
    memory_folder: str | None
    """A folder held in memory, where trainer and engine on one machine hand weights over; None: the temporary folder."""


def shared_memory_folder() -> str | None:
    """Linux keeps /dev/shm in memory; elsewhere, or where it is not writable, None."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


_active: Platform | None = None


def activate(name: str, local_rank: int = 0) -> Platform:
    """Selects the platform the recipe names, after checking that the machine has it.

    Raises PlatformError for ``cuda`` without a usable device.
    """
    global _active
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: whatever is loaded is a folder, never a download
    if name == "cuda":
        from glm.platform import cuda
        chosen = cuda.platform(local_rank)
    elif name == "host":
        from glm.platform import host
        chosen = host.platform()
    else:
        raise PlatformError("recipe key platform", repr(name), "host or cuda", "name one of them in the hardware file")
    refuse_unrelated_apex()
    chosen.prepare_megatron()
    _active = chosen
    return chosen


def active() -> Platform:
    """The platform of this process."""
    assert _active is not None, "glm.platform.activate() has not been called in this process"
    return _active
