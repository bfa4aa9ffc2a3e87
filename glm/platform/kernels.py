"""Which optional GPU kernels are installed: transformer-engine and NVIDIA apex. Looks, imports nothing."""

from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from glm.errors import PlatformError

GRADIENT_EXTENSION = "fused_weight_gradient_mlp_cuda"
"""apex's product that adds a bf16 weight gradient to an fp32 buffer (megatron's gradient_accumulation_fusion)."""


@dataclass(frozen=True)
class Apex:
    """``unrelated``: PyPI's apex is a toolkit for web applications that has only the name in common."""

    state: Literal["absent", "nvidia", "unrelated"]
    adds_gradients: bool = False
    """Built with the extension named above."""


def apex() -> Apex:
    """NVIDIA's apex is told by its folders; it is built from source, and pip gets another package of that name."""
    found = util.find_spec("apex")
    if found is None:
        return Apex("absent")
    folders = [Path(place) for place in found.submodule_search_locations or ()]
    if not any((folder / "normalization").is_dir() and (folder / "multi_tensor_apply").is_dir() for folder in folders):
        return Apex("unrelated")
    return Apex("nvidia", adds_gradients=util.find_spec(GRADIENT_EXTENSION) is not None)


def refuse_unrelated_apex() -> None:
    """megatron imports whatever is called apex. Raises PlatformError when that is not NVIDIA's."""
    if apex().state == "unrelated":
        raise PlatformError(
            "package apex", "PyPI's apex, a toolkit for web applications", "NVIDIA's apex (github.com/NVIDIA/apex, built from source), or none",
            "pip uninstall apex; nothing here needs NVIDIA's, it makes gradients on a GPU cheaper",
        )


def transformer_engine() -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return None
