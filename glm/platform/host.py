"""A machine without a GPU: CPU tensors, gloo, and stand-ins for what megatron-core expects of CUDA."""

import resource

import torch

from glm.platform.interface import Platform, shared_memory_folder


def platform() -> Platform:
    """CPU and gloo."""
    from glm.platform import host_megatron

    return Platform(
        name="host",
        backend="gloo",
        device=torch.device("cpu"),
        prepare_megatron=host_megatron.install,
        peak_memory_bytes=lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        fully_deterministic=True,
        adds_gradients=False,
        memory_folder=shared_memory_folder(),
    )
