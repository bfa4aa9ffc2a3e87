"""The parts of a model that gradients and updates are told of: layer by layer and kind by kind."""

import re
from collections.abc import Iterable

PARTS = ("embedding", "output", "attention", "dense", "experts", "router", "norms")
"""dense: feed-forward layers without experts, shared experts, and the projection into the MTP layer; norms: and biases."""

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_MATRICES = (
    ("embedding.", "embedding"), ("output_layer.", "output"), (".experts.", "experts"), (".router.", "router"),
    (".self_attention.", "attention"),
)


def part_of(name: str, dimensions: int) -> str:
    """The part of a parameter under its name in the whole model."""
    if dimensions < 2:
        return "norms"
    name = name.replace(".shared_experts.", ".shared.")
    return next((part for mark, part in _MATRICES if mark in f".{name}" or name.startswith(mark)), "dense")


def layer_of(name: str, num_layers: int) -> int:
    """Counted from 0; the MTP layer stands behind the last, and what belongs to no layer behind that one."""
    found = _LAYER.match(name)
    if found:
        return int(found[1])
    return num_layers if name.startswith("mtp.") else num_layers + 1


def cells(named: Iterable[tuple[str, object]], num_layers: int) -> dict[tuple[int, int], list]:
    """(layer, index of the part) -> the parameters there."""
    found: dict[tuple[int, int], list] = {}
    for name, parameter in named:
        found.setdefault((layer_of(name, num_layers), PARTS.index(part_of(name, parameter.dim()))), []).append(parameter)
    return found
