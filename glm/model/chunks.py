"""The chunks of a model on one rank under the names the whole model has."""

import re
from collections.abc import Iterator, Sequence

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)(\.|$)")


def named_parameters(chunks: Sequence[torch.nn.Module]) -> list[tuple[str, torch.nn.Parameter]]:
    """Every parameter of this rank; ``decoder.layers.N`` counts the layers of the whole model.

    Stages name the same tensor alike in one case only: the MTP layer's copy of the embedding, whose parameter has
    ``shared_embedding`` set.
    """
    return [(name, parameter) for chunk in chunks for name, parameter in _renamed(chunk, chunk.named_parameters())]


def named_modules(chunks: Sequence[torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    """Every module of this rank, named like the parameters."""
    return [(name, module) for chunk in chunks for name, module in _renamed(chunk, chunk.named_modules())]


def named_tensors(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of this rank, detached, by global name."""
    found = {}
    for chunk in chunks:
        # state_dict() also brings back the router bias's float32, which Float16Module takes away (router.py:668)
        # transformer-engine's layers add an _extra_state each, which holds FP8 history and no weight
        state = {
            name: value for name, value in chunk.state_dict().items()
            if isinstance(value, torch.Tensor) and not name.endswith("_extra_state")
        }
        found |= dict(_renamed(chunk, state.items()))
    return found


def _renamed(chunk: torch.nn.Module, named) -> Iterator[tuple[str, object]]:
    numbers = {
        str(index): str(layer.layer_number - 1)
        for index, layer in enumerate(chunk.decoder.layers) if isinstance(layer, TransformerLayer)
    }
    for name, value in named:
        yield _LAYER.sub(lambda match: f"{match[1]}{numbers[match[2]]}{match[3]}", name), value
