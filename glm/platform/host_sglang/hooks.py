"""Puts the host's operations in place of SGLang's kernels, and proves that they are there.

SGLang only logs a hook that fails (S/plugins/hook_registry.py:150) and would then launch a Triton kernel without a GPU,
or worse, compute something else. So every seam is written down once, in REPLACED, WRAPPED or EMPTY, and verify_seams()
stops the process when one of them is gone, has other arguments than ours, or is still SGLang's own.
"""

import importlib
import inspect
import multiprocessing
import pkgutil
import sys
from typing import Callable

from glm.errors import PlatformError
from glm.platform.host_sglang import sampling_ops, speculative_ops

REPLACED: dict[str, Callable] = {
    "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func": speculative_ops.assign_req_to_token_pool,
    "sglang.kernels.ops.speculative.cache_locs.assign_draft_cache_locs_contiguous_func":
        speculative_ops.assign_draft_cache_locs,
    "sglang.kernels.ops.speculative.spec_tree.build_tree_kernel_efficient_func": speculative_ops.build_chain,
    "sglang.kernels.ops.speculative.spec_tree.verify_tree_greedy_func": speculative_ops.verify_greedy,
    "sglang.kernels.ops.speculative.eagle.fill_bonus_tokens_func": speculative_ops.fill_bonus_tokens,
    "sglang.kernels.ops.speculative.reject_sampling.chain_speculative_sampling_triton": speculative_ops.verify_by_rejection,
    "sglang.kernels.ops.speculative.row_argmax.row_argmax": sampling_ops.row_argmax,
    "sglang.kernels.ops.sampling.murmur_hash.murmur_hash32": sampling_ops.murmur_hash32,
}
"""Functions that launch a Triton kernel. SGLang's registry also rebinds the copies other modules imported."""

EMPTY: dict[str, tuple[tuple[str, ...], Callable]] = {
    "top_k_renorm_prob": (("sglang.kernels.ops.sampling.renorm", "sglang.srt.speculative.eagle_utils"),
                          sampling_ops.top_k_renorm),
    "top_p_renorm_prob": (("sglang.kernels.ops.sampling.renorm", "sglang.srt.speculative.eagle_utils"),
                          sampling_ops.top_p_renorm),
}
"""Names that are None on an unknown platform, and the modules that hold one. Never given to the registry: it rebinds
every attribute of every module that ``is`` the original, and that would be every None of the process."""


def _draft_decode_backend(original: Callable, factory):
    """S/speculative/draft_utils.py:96 looks the backend up in a dict of its own."""
    if factory.speculative_num_steps <= 1:
        return original(factory)
    from glm.platform.host_sglang.attention import HostDraftAttention

    backend = HostDraftAttention(factory.draft_model_runner, factory.topk, factory.speculative_num_steps)
    for each in (backend, *backend.attn_backends):
        _stamp(each)
    return backend


def _draft_extend_backend(original: Callable, factory):
    """S/speculative/draft_utils.py:125, as above."""
    from glm.platform.host_sglang.attention import HostAttention

    return _stamp(HostAttention(factory.draft_model_runner))


def _forked_processes(original: Callable, server_args) -> None:
    """S/entrypoints/engine.py:1995 makes the scheduler and detokenizer start from nothing, because CUDA does not survive
    a fork. Without CUDA they fork, and spare two imports of everything: a server starts in half the time."""
    original(server_args)
    multiprocessing.set_start_method("fork", force=True)


def _stamp(backend):
    from glm.platform.host_sglang.platform import ATTENTION_BACKEND

    backend.prefill_attention_backend_str = backend.decode_attention_backend_str = ATTENTION_BACKEND
    return backend


WRAPPED: dict[str, Callable] = {
    "sglang.srt.speculative.draft_utils.DraftBackendFactory.create_decode_backend": _draft_decode_backend,
    "sglang.srt.speculative.draft_utils.DraftBackendFactory.create_draft_extend_backend": _draft_extend_backend,
    "sglang.srt.entrypoints.engine._set_envs_and_config": _forked_processes,
}


def register() -> None:
    """Entry point ``sglang.srt.plugins``: called in every process of SGLang, whatever the platform. Does nothing unless
    this one is the host's."""
    from sglang.srt.environ import envs

    if envs.SGLANG_PLATFORM.get() != "host":
        return
    from sglang.srt.arg_groups import choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from glm.platform.host_sglang.platform import ATTENTION_BACKEND

    for names in (choices.ATTENTION_BACKEND_CHOICES, choices.DRAFT_ATTENTION_BACKEND_CHOICES):
        if ATTENTION_BACKEND not in names:
            names.append(ATTENTION_BACKEND)
    for target, ours in REPLACED.items():
        HookRegistry.register(target, ours, HookType.REPLACE)
    for target, ours in WRAPPED.items():
        HookRegistry.register(target, ours, HookType.AROUND)


def fill_empty_slots() -> None:
    """Fills the names of EMPTY and registers the attention backend; called once, by HostPlatform.init_backend."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    from glm.platform.host_sglang.attention import HostAttention
    from glm.platform.host_sglang.platform import ATTENTION_BACKEND

    register_attention_backend(ATTENTION_BACKEND)(HostAttention)
    for name, (modules, ours) in EMPTY.items():
        for module in modules:
            held = importlib.import_module(module)
            if getattr(held, name, "missing") is None:
                setattr(held, name, ours)


def verify_seams() -> None:
    """Raises PlatformError naming every stand-in that is not, or not everywhere, in its place."""
    faults = [*_hook_faults(), *_slot_faults()]
    if faults:
        raise PlatformError(
            "the host platform's stand-ins inside SGLang", "; ".join(faults),
            "every stand-in of glm/platform/host_sglang/hooks.py in its place (written for sglang 0.5.23)",
            "install sglang==0.5.23, or adapt the stand-ins to the installed version",
        )


def _hook_faults() -> list[str]:
    faults = []
    for target, ours in (REPLACED | WRAPPED).items():
        try:
            current = pkgutil.resolve_name(target)
        except (ImportError, AttributeError) as problem:
            faults.append(f"{target} does not exist ({problem})")
            continue
        original = getattr(current, "__wrapped__", None)
        if original is None or not any(cell.cell_contents is ours for cell in current.__closure__ or ()):
            faults.append(f"{target} is not replaced")
        elif target in REPLACED and _arguments(original) != _arguments(ours):
            faults.append(f"{target} takes {_arguments(original)}, ours takes {_arguments(ours)}")
        elif stale := _holders(original):
            faults.append(f"{target} is still SGLang's own in {', '.join(stale)}")
    return faults


def _slot_faults() -> list[str]:
    return [
        f"{module}.{name} is {getattr(importlib.import_module(module), name, 'missing')!r}"
        for name, (modules, ours) in EMPTY.items()
        for module in modules
        if getattr(importlib.import_module(module), name, "missing") is not ours
    ]


def _arguments(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)


def _holders(original: Callable) -> list[str]:
    """Modules of SGLang that still have the original under some name."""
    return [
        f"{name}.{attribute}"
        for name, module in list(sys.modules.items())
        if name.startswith("sglang.") and module is not None
        for attribute, value in list(vars(module).items())
        if value is original
    ]
