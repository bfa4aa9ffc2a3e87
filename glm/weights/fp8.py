"""Weights in FP8 blocks: float8_e4m3fn with one float32 factor for each block of 128 x 128, the form DeepSeek-V3 brought.

A weight is its FP8 value times the factor of its block, which the files call ``weight_scale_inv``. Reading multiplies in
float32 and rounds once to the model's type, as SGLang does (srt/layers/quantization/fp8_utils.py, block_quant_dequant).

The factor is the block's largest absolute value / 448. Two properties follow, both tested:
- A quantised weight is off by at most 2^-4 of itself (half a step of 3 mantissa bits) or, near zero, by 2^-10 factors (half of
  the smallest step): never by more than 1/28 of the block's largest value (half a step below 448 is 16).
- Quantising again what was read gives the same bytes. That holds for factors made here, in float32 and, when the weights were
  bfloat16 before, in bfloat16; not for any factor: 448 * s / 448 rounds twice, and s must come from a division by 448.
"""

import math
from dataclasses import dataclass
from typing import Iterable, Iterator

import torch
from torch import Tensor

from glm.errors import CheckpointError, NumericsError
from glm.recipe.sections import Model
from glm.weights.hf_shapes import hf_shapes
from glm.weights.name_map import copies

BLOCK = 128
FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
_SCALE = "_scale_inv"
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""What SGLang keeps as one matrix: quantised together or not at all."""
_QUANTISED = (*_FUSED[0], "o_proj", *_FUSED[1], "down_proj")


def quantise(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """[M, N] of any floating type to FP8 [M, N] and float32 factors [ceil(M / 128), ceil(N / 128)].

    A block of zeros has factor 1. Holds 128 rows in float32 at a time. Raises NumericsError for a weight that is not finite.
    """
    quantised = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scales = torch.empty(scale_shape(weight.shape), dtype=torch.float32, device=weight.device)
    columns = weight.shape[1]
    for number, rows in enumerate(weight.split(BLOCK)):
        blocks = _in_blocks(rows.float())  # [rows, blocks, 128]
        largest = blocks.abs().amax(dim=(0, 2))
        if not largest.isfinite().all():
            raise NumericsError(name, "a value that is not finite", "finite weights", "find the step after which it appeared")
        # a factor below the smallest normal number would lose its own bits, and 0 would divide by zero
        scale = torch.where(largest > 0, (largest / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny), 1.0)
        scales[number] = scale
        values = (blocks / scale[:, None]).clamp(-_LARGEST, _LARGEST)
        quantised[number * BLOCK : number * BLOCK + len(rows)] = values.flatten(1)[:, :columns].to(FP8)
    return quantised, scales


def dequantise(quantised: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """FP8 [M, N] times its factors, in float32, rounded to ``dtype``; the last blocks may be cut by the edges."""
    weight = torch.empty(quantised.shape, dtype=dtype, device=quantised.device)
    columns = quantised.shape[1]
    for number, rows in enumerate(quantised.split(BLOCK)):
        values = _in_blocks(rows.float()) * scales[number, :, None]
        weight[number * BLOCK : number * BLOCK + len(rows)] = values.flatten(1)[:, :columns]
    return weight


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the factors of a matrix [M, N], or of a stack [E, M, N] of them."""
    *stack, rows, columns = shape
    return (*stack, math.ceil(rows / BLOCK), math.ceil(columns / BLOCK))


def scale_name(name: str) -> str:
    return name + _SCALE


def is_scale(name: str) -> bool:
    return name.endswith(_SCALE)


def of_scale(name: str) -> str:
    """The weight that the factors ``name`` belong to."""
    return name.removesuffix(_SCALE)


@dataclass(frozen=True)
class Fp8Plan:
    """What of a model is quantised."""

    quantised: frozenset[str]
    """Names of tensors; each gets another tensor, ``scale_name``."""
    kept: tuple[str, ...]
    """Modules that would be, but do not divide into blocks: they keep their type, and config.json names them to the reader."""

    @property
    def config(self) -> dict[str, object]:
        """config.json's ``quantization_config``, as SGLang and transformers read it."""
        return {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["lm_head", "eh_proj", *self.kept],
        }


def fp8_plan(shape: Model) -> Fp8Plan:
    """Attention and feed-forward matrices, the MTP layer's too; embedding, head, norms, biases, routers and eh_proj are not.

    SGLang refuses a fused matrix whose parts are not whole blocks (fp8.py, validate_block_quant_shapes) and experts of such a
    width (create_fp8_moe_weight_): GLM-4.5-Air's dense layer has 10944 = 85.5 blocks. A module of which one matrix does not
    divide is therefore kept as it is, all parts of it, and named in ``kept``.
    """
    shapes = {
        name: size for name, size in hf_shapes(shape).items()
        if name not in copies(shape) and name.removesuffix(".weight").rpartition(".")[2] in _QUANTISED and len(size) == 2
    }
    fits = {name: not any(length % BLOCK for length in size) for name, size in shapes.items()}
    quantised = frozenset(name for name in shapes if all(fits[part] for part in _together(name) if part in fits))
    modules = {_module(name) for name in shapes.keys() - quantised}
    # SGLang's draft model calls the MTP layer model.decoder
    mtp = f"model.layers.{shape.num_layers}."
    modules |= {name.replace(mtp, "model.decoder.") for name in modules if name.startswith(mtp)}
    return Fp8Plan(quantised, tuple(sorted(modules)))


def fp8_tensors(tensors: Iterable[tuple[str, Tensor]], plan: Fp8Plan) -> Iterator[tuple[str, Tensor]]:
    """``tensors`` with each of the plan's replaced by its FP8 values and its factors. Holds one of them at a time."""
    for name, tensor in tensors:
        if name in plan.quantised:
            values, scales = quantise(tensor, name)
            yield name, values
            yield scale_name(name), scales
        else:
            yield name, tensor


def check_quantization_config(found: object, where: str) -> None:
    """Raises CheckpointError unless it is FP8 in blocks of 128 x 128 with activations scaled as they come."""
    expected = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    told = found if isinstance(found, dict) else {}
    differing = [key for key, value in expected.items() if told.get(key) != value]
    if differing or told.get("fmt", "e4m3") != "e4m3":
        key = differing[0] if differing else "fmt"
        raise CheckpointError(
            f"{where}: quantization_config", f"{key} {told.get(key)!r}",
            f"FP8 in blocks: {', '.join(f'{key} {value}' for key, value in expected.items())}",
            "use the bfloat16 weights, or a folder quantised in blocks (to_hf --fp8)",
        )


def _in_blocks(rows: Tensor) -> Tensor:
    """[R, N] to [R, ceil(N / 128), 128], filled up with zeros."""
    missing = -rows.shape[1] % BLOCK
    return torch.nn.functional.pad(rows, (0, missing)).unflatten(1, (-1, BLOCK))


def _together(name: str) -> list[str]:
    """The tensors that are quantised only with ``name``: its parts in SGLang's fused matrix; an expert's three."""
    module, _, kind = name.removesuffix(".weight").rpartition(".")
    if ".mlp." in name:  # gate, up and down have the same width: SGLang builds experts whole
        return [f"{module}.{other}.weight" for other in (*_FUSED[1], "down_proj")]
    fused = next((parts for parts in _FUSED if kind in parts), (kind,))
    return [f"{module}.{other}.weight" for other in fused]


def _module(name: str) -> str:
    """``model.layers.3.self_attn.q_proj``; of a routed expert ``model.layers.3.mlp.experts``: SGLang asks for them together."""
    module = name.removesuffix(".weight")
    return module.split(".experts.")[0] + ".experts" if ".mlp.experts." in module else module
