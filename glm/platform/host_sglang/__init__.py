"""SGLang on a machine without a GPU: an out-of-tree platform plug-in for the released, unpatched sglang 0.5.23.

SGLang loads it by name, in every process of a server started with SGLANG_PLATFORM=host, and in no other:

    environment.py       what a server process is started with
    platform.py          device, memory pool and back-ends, through SGLang's platform interface
    attention.py         one batched scaled-dot-product attention for prefill, decode, draft and verify
    speculative_ops.py   the Triton kernels of chain speculative decoding, in torch
    sampling_ops.py      the Triton kernels of sampling, in torch
    hooks.py             puts the above in place of the kernels, and verify_seams() proves that it did
    torchvision_stub.py  an import of text-only serving that nothing uses

References are to files of the installed ``sglang`` package: S/ is sglang/srt, K/ is sglang/kernels.
"""


def activate() -> str:
    """Entry point ``sglang.srt.platforms``: called once a process, before SGLang imports its model configurations
    (S/platforms/__init__.py:117). Returns the name of the platform class."""
    from glm.platform.host_sglang.torchvision_stub import install

    install()
    return "glm.platform.host_sglang.platform.HostPlatform"
