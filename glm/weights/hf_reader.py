"""Reading a Hugging Face folder: where each tensor lies, found and proved from the headers before the first is read."""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from glm.errors import CheckpointError
from glm.recipe.sections import Model
from glm.weights.digest import tensor_digest
from glm.weights.hf_config import model_section, rotary_base
from glm.weights.hf_folder import CONFIG, INDEX, MANIFEST, PARAMS, SINGLE
from glm.weights.hf_shapes import hf_shapes
from glm.weights.name_map import check_names, copies, hf_names
from glm.weights.places import Place, safetensors_places

_TODO = "copy or download the folder again; a file of it is missing or was cut"
_STACKED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)$")


class HFFolder:
    """A folder of GLM-4.5 weights, of which only the headers are read: nothing of it stays open or in memory.

    Takes one file or shards with an index, in which the tensors may stand in any order; an expert's matrices on their own
    or all experts of a layer stacked, as transformers 5 holds them (gate_up_proj [E, 2F, H], down_proj [E, H, F]); with or
    without the MTP layer's copies of embedding and head. The names here are always those of name_map.hf_names.

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
        self._places = _unstacked(_places(self.folder), self.shape)
        check_names(self._places, hf_names(self.shape), optional=copies(self.shape), where=str(self.folder))
        self._check_shapes()
        self.params: str = self._params()
        """``bf16`` when all but the routers are, else ``fp32``, which holds both."""

    def __enter__(self) -> "HFFolder":
        return self

    def __exit__(self, *_) -> None:
        pass

    @property
    def names(self) -> list[str]:
        """All tensors, copies included."""
        return list(self._places)

    def place(self, name: str) -> Place:
        """Where the tensor's bytes lie: contiguous and row-major, also of one expert's matrix in a stacked tensor."""
        if name not in self._places:
            raise CheckpointError(str(self.folder), f"no tensor {name}", "every tensor of the model", _TODO)
        return self._places[name]

    def expected_digest(self, name: str) -> str | None:
        """What the folder's manifest says of the tensor (see tensor_digest); None without a manifest."""
        return self._manifest.get(name, {}).get("sha256")

    def get(self, name: str) -> Tensor:
        """One tensor, in memory of its own. Raises CheckpointError when it is not there or not what the manifest says."""
        tensor = self.place(name).read()
        if self.expected_digest(name) is not None:
            self.check_digest(name, tensor_digest(tensor))
        return tensor

    def check_digest(self, name: str, digest: str) -> None:
        """Raises CheckpointError when the manifest says something else of the tensor; for who reads the bytes himself."""
        if self.expected_digest(name) not in (None, digest):
            raise CheckpointError(
                f"{self.place(name).path}: {name}", "other bytes than when it was written", f"what {MANIFEST} says",
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

    def _check_shapes(self) -> None:
        expected = hf_shapes(self.shape)
        for name, place in self._places.items():
            if place.shape != expected[name]:
                raise CheckpointError(
                    f"{place.path}: {name}", f"shape {list(place.shape)}", f"shape {list(expected[name])}",
                    "use the configuration (config.json) that belongs to these weights",
                )

    def _params(self) -> str:
        for name, place in self._places.items():
            if place.dtype not in PARAMS:
                raise CheckpointError(
                    f"{place.path}: {name}", f"data type {place.dtype}", "float32 or bfloat16", "use the unquantised weights",
                )
        # this suite keeps the routers in float32 whatever the model is in, and the released files their biases
        types = {place.dtype for name, place in self._places.items() if ".mlp.gate." not in name}
        return "bf16" if types == {torch.bfloat16} else "fp32"


def _places(folder: Path) -> dict[str, Place]:
    """Every tensor of the folder under the name it has in the files; index and files must tell the same."""
    index = folder / INDEX
    weight_map = _section(index, "weight_map") if index.is_file() else None
    found: dict[str, Place] = {}
    for file in sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]:
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
    result = {}
    E, F, H = shape.num_experts, shape.expert_ffn_size, shape.hidden_size
    for name, place in found.items():
        stacked = _STACKED.match(name)
        if stacked is None:
            parts = {name: place}
        else:
            expected = (E, 2 * F, H) if stacked[2] == "gate_up_proj" else (E, H, F)
            if place.shape != expected:
                raise CheckpointError(
                    f"{place.path}: {name}", f"shape {list(place.shape)}", f"shape {list(expected)}",
                    "use the configuration (config.json) that belongs to these weights",
                )
            parts = _experts(stacked[1], stacked[2], place, F)
        twice = result.keys() & parts.keys()
        if twice:
            raise CheckpointError(f"{place.path}: {name}", f"{min(twice)} stands there too", "each expert once", _TODO)
        result |= parts
    return result


def _experts(prefix: str, kind: str, place: Place, width: int) -> dict[str, Place]:
    if kind == "down_proj":
        return {f"{prefix}.{expert}.down_proj.weight": place.item(expert) for expert in range(place.shape[0])}
    return {
        f"{prefix}.{expert}.{half}_proj.weight": place.item(expert).rows(number * width, (number + 1) * width)
        for expert in range(place.shape[0]) for number, half in enumerate(("gate", "up"))
    }


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
