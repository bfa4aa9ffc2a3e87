"""Stand-ins for what megatron-core 0.16.1 expects of CUDA. Loaded only under ``platform: host``.

Each entry of ``SEAMS`` names the upstream line that needs it. ``install()`` checks that every target still exists, so a
new megatron release that moves one stops here and not in the middle of a training run.
"""

import importlib
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable

import torch

from glm.errors import PlatformError
from glm.platform.host_torch import host_torch

# Every module that binds jit_fuser or torch at import time and that a training process uses.
_MODULES = (
    "megatron.core",
    "megatron.core.distributed",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.optimizer",
    "megatron.core.dist_checkpointing.serialization",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.transformer.moe.experts",
    "megatron.core.transformer.multi_token_prediction",
)


def _cpu_rng_state(*args, **kwargs):
    return torch.get_rng_state()


def _set_cpu_rng_state(state, *args, **kwargs):
    torch.set_rng_state(state)


def _already_on_cpu(tensor, as_numpy=False, record_stream=False):
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


@dataclass(frozen=True)
class Seam:
    module: str
    name: str
    replacement: Callable
    needed_by: str


SEAMS = (
    Seam("megatron.core.tensor_parallel.random", "_get_cuda_rng_state", _cpu_rng_state,
         "tensor_parallel/random.py:41 reads torch.cuda.default_generators"),
    Seam("megatron.core.tensor_parallel.random", "_set_cuda_rng_state", _set_cpu_rng_state,
         "tensor_parallel/random.py:72 writes through torch.cuda._lazy_call"),
    Seam("megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu", _already_on_cpu,
         "moe_utils.py:1078 returns a tensor unless it is on CUDA, all_to_all_single (mappings.py:444) wants numbers"),
)


@contextmanager
def _uncompiled():
    """jit_fuser is bound to torch.compile by every module at import (jit.py:21), before disable_jit_fuser() can act."""
    compile_ = torch.compile
    torch.compile = lambda function=None, **kwargs: function if function is not None else (lambda inner: inner)
    try:
        yield
    finally:
        torch.compile = compile_


def install() -> None:
    """Imports megatron-core and puts the stand-ins in place; a second call does nothing.

    Raises PlatformError when megatron was imported before, or when a target is gone.
    """
    if getattr(sys.modules.get("megatron.core"), "_glm_host", False):
        return
    if "megatron.core" in sys.modules:
        raise PlatformError(
            "platform: host", "megatron.core is already imported", "activation before any import of megatron",
            "call glm.platform.activate('host') first",
        )
    with _uncompiled():
        modules = [importlib.import_module(name) for name in _MODULES]
    importlib.import_module("megatron.core.jit").disable_jit_fuser()
    for seam in SEAMS:
        target = importlib.import_module(seam.module)
        if not hasattr(target, seam.name):
            raise PlatformError(
                f"platform: host, {seam.module}.{seam.name}", "no such name in the installed megatron-core",
                f"the name that {seam.needed_by}", "install the pinned megatron-core (glm doctor)",
            )
        setattr(target, seam.name, seam.replacement)
    namespace = host_torch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = namespace
    modules[0]._glm_host = True
