"""An inert ``torchvision``, because S/configs/deepseek_ocr.py:7-8 imports one for a picture model nobody serves here.

Installing the real package would cost 250 MB, and transformers would start to import from it.
"""

import enum
import importlib.machinery
import importlib.util
import sys
import types


class InterpolationMode(enum.Enum):
    """The names that code may mention as default arguments; never used."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


def install() -> None:
    """Puts three empty modules into ``sys.modules`` of this process, unless a real torchvision is installed."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return
    # transformers caches the answer: asked now, it stays "not there" and transformers never touches the stand-in
    from transformers.utils.import_utils import is_torchvision_available

    assert not is_torchvision_available()
    root, transforms, functional = (
        _module(name) for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    )
    root.transforms, root.__version__ = transforms, "0.0.0"
    transforms.functional = functional
    transforms.InterpolationMode = functional.InterpolationMode = InterpolationMode


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name, "Stand-in of the host platform.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    sys.modules[name] = module
    return module
