"""``torch`` as megatron-core sees it on a machine without a GPU.

megatron-core writes ``torch.cuda.current_device()``, ``torch.cuda.Stream()`` and ``device="cuda"`` in its own modules.
Instead of changing the real ``torch`` for the whole process (SGLang's and transformers' too), each megatron module gets
a namespace that equals torch but for those names.
"""

import contextlib
import functools
import types

import torch

CPU = torch.device("cpu")

# Factories megatron calls with device="cuda" or device=torch.cuda.current_device(), and pin_memory=True.
_FACTORIES = (
    "tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn",
    "empty_like", "zeros_like", "ones_like", "full_like",
)


class _Stream:
    """A CUDA stream on a device that has none: everything is already in order."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass

    def record_event(self, event=None):
        return event or _Event()

    def query(self):
        return True


class _Event:
    """A CUDA event that has always happened."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


def _nothing(*args, **kwargs) -> None:
    return None


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


class _Nvtx:
    range_push = staticmethod(_nothing)
    range_pop = staticmethod(_nothing)


class _Cuda(types.ModuleType):
    """What megatron sees as ``torch.cuda``; names not listed are torch's own and fail as they would."""

    Stream = _Stream
    Event = _Event
    nvtx = _Nvtx()
    current_device = staticmethod(lambda: CPU)
    device_count = staticmethod(lambda: 1)
    synchronize = staticmethod(_nothing)
    empty_cache = staticmethod(_nothing)
    set_device = staticmethod(_nothing)
    current_stream = staticmethod(lambda *args, **kwargs: _Stream())
    default_stream = staticmethod(lambda *args, **kwargs: _Stream())
    stream = staticmethod(lambda stream: contextlib.nullcontext())
    get_rng_state = staticmethod(lambda *args, **kwargs: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *args, **kwargs: torch.set_rng_state(state))
    manual_seed = staticmethod(_seed)
    manual_seed_all = staticmethod(_seed)
    is_current_stream_capturing = staticmethod(lambda: False)

    def __getattr__(self, name):
        return getattr(torch.cuda, name)


class _Distributed(types.ModuleType):
    """``torch.distributed`` for gloo, which gathers and scatters equal parts only.

    Expert parallelism with expert tensor parallelism moves as many rows from each rank as its experts got tokens
    (tensor_parallel/mappings.py:150 and :190): here parts are padded to the longest.
    """

    def __getattr__(self, name):
        return getattr(torch.distributed, name)

    @staticmethod
    def all_gather(parts, part, group=None, async_op=False):
        longest = max(one.shape[0] for one in parts)
        if async_op or all(one.shape[0] == longest for one in parts):
            return torch.distributed.all_gather(parts, part, group=group, async_op=async_op)
        padded = [one.new_empty(longest, *one.shape[1:]) for one in parts]
        torch.distributed.all_gather(padded, _padded(part, longest), group=group)
        for one, whole in zip(parts, padded):
            one.copy_(whole[:one.shape[0]])

    @staticmethod
    def reduce_scatter(own, parts, op=torch.distributed.ReduceOp.SUM, group=None, async_op=False):
        longest = max(one.shape[0] for one in parts)
        if async_op or all(one.shape[0] == longest for one in parts):
            return torch.distributed.reduce_scatter(own, parts, op=op, group=group, async_op=async_op)
        whole = own.new_empty(longest, *own.shape[1:])
        torch.distributed.reduce_scatter_tensor(whole, torch.cat([_padded(one, longest) for one in parts]), op=op, group=group)
        own.copy_(whole[:own.shape[0]])


def _padded(part: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([part, part.new_zeros(rows - part.shape[0], *part.shape[1:])])


def _on_cpu(factory):
    @functools.wraps(factory)
    def create(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return create


class _HostTorch(types.ModuleType):
    def __getattr__(self, name):  # submodules torch loads lazily
        return getattr(torch, name)


def host_torch() -> types.ModuleType:
    """A module equal to ``torch`` except that CUDA means this CPU."""
    namespace = _HostTorch("torch")
    namespace.__dict__.update(torch.__dict__)
    namespace.cuda = _Cuda("torch.cuda")
    namespace.distributed = _Distributed("torch.distributed")
    for name in _FACTORIES:
        setattr(namespace, name, _on_cpu(getattr(torch, name)))
    return namespace
