"""Reading a Hugging Face folder: where each tensor lies, found and proved from the headers before the first is read."""

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from glm.errors import CheckpointError
from glm.recipe.sections import Model
from glm.weights import fp8
from glm.weights.digest import tensor_digest
from glm.weights.hf_config import model_section, rotary_base
from glm.weights.hf_folder import CONFIG, DTYPES, INDEX, MANIFEST, PARAMS, SINGLE
from glm.weights.hf_shapes import hf_shapes
from glm.weights.name_map import check_names, copies, hf_names
from glm.weights.places import Place, safetensors_places

_TODO = "copy or download the folder again; a file of it is missing or was cut"
_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors$")
_STACKED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)(_scale_inv)?$")


class HFFolder:
    """A folder of GLM-4.5 weights, of which only the headers are read: nothing of it stays open or in memory.

    Takes one file or shards with an index, in which the tensors may stand in any order; an expert's matrices on their own
    or all experts of a layer stacked, as transformers 5 holds them (gate_up_proj [E, 2F, H], down_proj [E, H, F]); with or
    without the MTP layer's copies of embedding and head; matrices in FP8 blocks. The names are always those of
    name_map.hf_names.

    Opening it raises CheckpointError for a file that is cut or missing, a tensor that is missing, unknown, in two files,
    of another shape than config.json's, or of a data type this suite does not have. Where the folder has a manifest, what
    is read is compared with its digests.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        config_path = self.folder / CONFIG
        if not config_path.is_file():
            raise CheckpointError(str(self.folder), f"no {CONFIG}", "a Hugging Face model folder", "correct the path")
        config = _json(config_path)
        self.shape: Model = model_section(config, str(config_path))
        self.rotary_base: int = rotary_base(config, str(config_path))
        manifest = self.folder / MANIFEST
        self._manifest = _section(manifest, "tensors") if manifest.is_file() else {}
        placed = _unstacked(_places(self.folder), self.shape)
        self._places = {name: place for name, place in placed.items() if not fp8.is_scale(name)}
        self._scales = {fp8.of_scale(name): place for name, place in placed.items() if fp8.is_scale(name)}
        check_names(self._places, hf_names(self.shape), optional=copies(self.shape), where=str(self.folder))
        self._check_shapes()
        self._check_scales(config.get("quantization_config") is not None)
        self.params: str = self._params()
        """``bf16`` when all but the routers are, else ``fp32``, which holds both. What is in FP8 is read in this type."""

    @property
    def names(self) -> list[str]:
        """All tensors, copies included."""
        return list(self._places)

    @property
    def is_quantised(self) -> bool:
        return bool(self._scales)

    def place(self, name: str) -> Place:
        """Where the tensor's bytes lie: contiguous and row-major, also of one expert's matrix in a stacked tensor.

        A tensor with a ``scale_place`` is in FP8 there, and fp8.dequantise of both is what it means.
        """
        if name not in self._places:
            raise CheckpointError(str(self.folder), f"no tensor {name}", "every tensor of the model", _TODO)
        return self._places[name]

    def scale_place(self, name: str) -> Place | None:
        """Where the float32 factors of an FP8 matrix lie; None for a tensor that is not quantised."""
        return self._scales.get(name)

    def dtype(self, name: str) -> torch.dtype:
        """The type ``get`` gives the tensor in: its own, or for FP8 that of the model."""
        return DTYPES[self.params] if name in self._scales else self.place(name).dtype

    def expected_digest(self, name: str) -> str | None:
        """What the folder's manifest says of the tensor (see tensor_digest); None without a manifest."""
        return self._manifest.get(name, {}).get("sha256")

    def get(self, name: str) -> Tensor:
        """One tensor, in memory of its own. Raises CheckpointError when it is not there or not what the manifest says."""
        tensor = self._read(name, self.place(name))
        if name not in self._scales:
            return tensor
        return fp8.dequantise(tensor, self._read(fp8.scale_name(name), self._scales[name]), self.dtype(name))

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Some rows of what ``get`` gives, without the others in memory and without the comparison with the manifest."""
        scales = self._scales.get(name)
        if scales is None:
            return self.place(name).rows(first, first + count).read()
        begin, end = first // fp8.BLOCK, math.ceil((first + count) / fp8.BLOCK)  # whole blocks
        top = begin * fp8.BLOCK
        values = self.place(name).rows(top, min(end * fp8.BLOCK, self.place(name).shape[0])).read()
        return fp8.dequantise(values, scales.rows(begin, end).read(), self.dtype(name))[first - top : first - top + count]

    def check(self, name: str) -> None:
        """Raises CheckpointError when the tensor's bytes, or its factors', are not what the manifest says; reads them in pieces."""
        for part, place in ((name, self.place(name)), (fp8.scale_name(name), self._scales.get(name))):
            if place is not None and self.expected_digest(part) is not None:
                self.check_digest(part, place.digest())

    def check_digest(self, name: str, digest: str) -> None:
        """Raises CheckpointError when the manifest says something else of the tensor; for who reads the bytes himself.

        ``name`` may be that of FP8 factors (fp8.scale_name).
        """
        if self.expected_digest(name) not in (None, digest):
            place = self._scales[fp8.of_scale(name)] if fp8.is_scale(name) else self.place(name)
            raise CheckpointError(
                f"{place.path}: {name}", "other bytes than when it was written", f"what {MANIFEST} says",
                f"export again; if the weights were changed on purpose, remove {self.folder / MANIFEST}",
            )

    def check_copies(self) -> None:
        """Raises CheckpointError when the MTP layer's copy of embedding or head is not the trunk's: there is one of each here.

        Reads both in pieces and holds neither.
        """
        for copy, original in copies(self.shape).items():
            if copy in self._places and self.place(copy).digest() != self.place(original).digest():
                raise CheckpointError(
                    f"{self.folder}: {copy}", f"differs from {original}", "a copy of it, as in GLM-4.5's released files",
                    "a model with an embedding or head of its own for the MTP layer is not supported",
                )

    def _read(self, name: str, place: Place) -> Tensor:
        tensor = place.read()
        if self.expected_digest(name) is not None:
            self.check_digest(name, tensor_digest(tensor))
        return tensor

    def _check_shapes(self) -> None:
        expected = hf_shapes(self.shape)
        for name, place in self._places.items():
            if place.shape != expected[name]:
                raise _misshapen(name, place, expected[name])

    def _check_scales(self, declared: bool) -> None:
        """FP8 tensors and factors must be pairs, and config.json must say that there are such."""
        for name, place in self._places.items():
            scale = self._scales.get(name)
            if place.dtype is fp8.FP8 and not declared:
                raise CheckpointError(f"{place.path}: {name}", f"data type {place.dtype}", "a quantization_config in config.json", _TODO)
            if (place.dtype is fp8.FP8) != (scale is not None):
                raise CheckpointError(
                    f"{place.path}: {name}", f"{place.dtype} {'without' if scale is None else 'with'} {fp8.scale_name(name)}",
                    "factors for every FP8 matrix and for no other", _TODO,
                )
            if scale is not None and (scale.dtype, scale.shape) != (torch.float32, fp8.scale_shape(place.shape)):
                raise CheckpointError(
                    f"{scale.path}: {fp8.scale_name(name)}", f"{scale.dtype} {list(scale.shape)}",
                    f"float32 {list(fp8.scale_shape(place.shape))}", "use weights quantised in blocks of 128 x 128",
                )
        if orphans := sorted(self._scales.keys() - self._places.keys()):
            raise CheckpointError(
                f"{self._scales[orphans[0]].path}: {fp8.scale_name(orphans[0])}", f"no tensor {orphans[0]}", "the matrix of the factors",
                _TODO,
            )

    def _params(self) -> str:
        plain = {name: place for name, place in self._places.items() if name not in self._scales}
        for name, place in plain.items():
            if place.dtype not in PARAMS:
                raise CheckpointError(
                    f"{place.path}: {name}", f"data type {place.dtype}", "float32 or bfloat16", "use the unquantised weights",
                )
        # this suite keeps the routers in float32 whatever the model is in, and the released files their biases
        types = {place.dtype for name, place in plain.items() if ".mlp.gate." not in name}
        return "bf16" if types == {torch.bfloat16} else "fp32"


def _places(folder: Path) -> dict[str, Place]:
    """Every tensor of the folder under the name it has in the files; index and files must tell the same."""
    index = folder / INDEX
    weight_map = _section(index, "weight_map") if index.is_file() else None
    for name, file in (weight_map or {}).items():
        if not isinstance(file, str):
            raise CheckpointError(f"{index}: {name}", f"the file {json.dumps(file)}", "the name of a file", _TODO)
    files = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
    if weight_map is not None and (stale := sorted(path.name for path in folder.iterdir() if _SHARD.match(path.name) and path.name not in files)):
        raise CheckpointError(
            str(folder / stale[0]), f"{INDEX} does not name it", "the files of one model and no other",
            "remove it if it is of an earlier download or export, else bring the index that names it",
        )
    found: dict[str, Place] = {}
    for file in files:
        path = folder / file
        if Path(file).name != file or not path.is_file():
            named = f"a file that {INDEX} names" if weight_map is not None else f"{SINGLE}, or {INDEX} and the files it names"
            raise CheckpointError(str(path), "no such file", named, _TODO)
        for name, place in safetensors_places(path).items():
            if name in found:
                raise CheckpointError(f"{path}: {name}", f"{found[name].path.name} has it too", "each tensor in one file", _TODO)
            if weight_map is not None and weight_map.get(name) != file:
                told = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise CheckpointError(f"{path}: {name}", f"{INDEX} has it {told}", "an index that belongs to the files", _TODO)
            found[name] = place
    for name, file in (weight_map or {}).items():
        if name not in found:
            raise CheckpointError(f"{folder / file}: {name}", "no such tensor in the file", f"it, as {INDEX} says", _TODO)
    return found


def _unstacked(found: dict[str, Place], shape: Model) -> dict[str, Place]:
    """The same with the experts of a stacked tensor each under a name of its own, as parts of its bytes."""
    result: dict[str, Place] = {}
    E, F, H = shape.num_experts, shape.expert_ffn_size, shape.hidden_size
    for name, place in found.items():
        parts = {name: place}
        if stacked := _STACKED.match(name):
            prefix, kind, scale = stacked.groups("")
            expected = (E, 2 * F, H) if kind == "gate_up_proj" else (E, H, F)
            if scale:
                if F % fp8.BLOCK:
                    raise CheckpointError(
                        f"{place.path}: {name}", f"experts {F} wide in one stack", f"a multiple of {fp8.BLOCK}: else one block "
                        "would hold rows of gate and of up", "use a folder with a file entry for each expert",
                    )
                expected = fp8.scale_shape(expected)
            if place.shape != expected:
                raise _misshapen(name, place, expected)
            parts = {part + scale: where for part, where in _experts(prefix, kind, place).items()}
        twice = result.keys() & parts.keys()
        if twice:
            raise CheckpointError(f"{place.path}: {name}", f"{min(twice)} stands there too", "each expert once", _TODO)
        result |= parts
    return result


def _experts(prefix: str, kind: str, stack: Place) -> dict[str, Place]:
    """The matrices of [E, H, F], or the upper (gate) and lower half of each of [E, 2F, H]."""
    experts = {f"{prefix}.{number}": stack.item(number) for number in range(stack.shape[0])}
    if kind == "down_proj":
        return {f"{name}.down_proj.weight": expert for name, expert in experts.items()}
    half = stack.shape[1] // 2
    return {
        f"{name}.{part}_proj.weight": expert.rows(first, first + half)
        for name, expert in experts.items() for part, first in (("gate", 0), ("up", half))
    }


def _misshapen(name: str, place: Place, expected: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{place.path}: {name}", f"shape {list(place.shape)}", f"shape {list(expected)}",
        "use the configuration (config.json) that belongs to these weights",
    )


def _section(path: Path, key: str) -> dict:
    value = _json(path).get(key)
    if not isinstance(value, dict):
        raise CheckpointError(str(path), f"{key}: {type(value).__name__}", f"an object {key}", _TODO)
    return value


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(str(path), str(error), "JSON", _TODO) from error
    if not isinstance(value, dict):
        raise CheckpointError(str(path), type(value).__name__, "a JSON object", _TODO)
    return value
