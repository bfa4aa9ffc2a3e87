"""Reading a Hugging Face folder: tensors one at a time, each file checked before the first is used."""

import json
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from glm.errors import CheckpointError
from glm.recipe.sections import Model
from glm.weights.digest import tensor_digest
from glm.weights.hf_config import model_section, rotary_base
from glm.weights.hf_folder import CONFIG, INDEX, MANIFEST, SINGLE
from glm.weights.name_map import check_names, copies, hf_names

_TODO = "copy or download the folder again; a file of it is missing or was cut"


class HFFolder:
    """A folder of GLM-4.5 weights, opened lazily. A context manager: leaving it closes the files.

    Opening reads every file's header: a cut file, a name without a file, an unknown or missing tensor and a data type this
    suite does not have raise CheckpointError. Where the folder has a manifest, each tensor is compared with its digest.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        config_path = self.folder / CONFIG
        if not config_path.is_file():
            raise CheckpointError(str(self.folder), f"no {CONFIG}", "a Hugging Face model folder", "correct the path")
        config = _json(config_path)
        self.shape: Model = model_section(config, str(config_path))
        self.rotary_base: int = rotary_base(config, str(config_path))
        self._manifest = _json(self.folder / MANIFEST)["tensors"] if (self.folder / MANIFEST).is_file() else {}
        self._stack = ExitStack()
        try:
            self._holder = self._open_files()
            check_names(self._holder, hf_names(self.shape), optional=copies(self.shape), where=str(self.folder))
            self.params = self._params()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "HFFolder":
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """All tensors, copies included."""
        return list(self._holder)

    def get(self, name: str) -> Tensor:
        """One tensor, in memory of its own. Raises CheckpointError when it is not there or not what the manifest says."""
        if name not in self._holder:
            raise CheckpointError(str(self.folder), f"no tensor {name}", "every tensor of the model", _TODO)
        path, file = self._holder[name]
        try:
            tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {name}", f"{type(error).__name__}: {error}", "a readable tensor", _TODO) from error
        expected = self._manifest.get(name, {}).get("sha256")
        if expected is not None and tensor_digest(tensor) != expected:
            raise CheckpointError(
                f"{path}: {name}", "other bytes than when it was written", f"what {MANIFEST} says",
                f"export again; if the weights were changed on purpose, remove {self.folder / MANIFEST}",
            )
        return tensor

    def check_copies(self) -> None:
        """Raises CheckpointError when the MTP layer's copy of embedding or head is not the trunk's: there is one of each here."""
        for copy, original in copies(self.shape).items():
            if copy in self._holder and tensor_digest(self.get(copy)) != tensor_digest(self.get(original)):
                raise CheckpointError(
                    f"{self.folder}: {copy}", f"differs from {original}", "a copy of it, as in GLM-4.5's released files",
                    "a model with an embedding or head of its own for the MTP layer is not supported",
                )

    def _open_files(self) -> dict[str, tuple[Path, object]]:
        """Tensor name -> (file, its open handle); index and files must tell the same."""
        index = self.folder / INDEX
        weight_map = _json(index)["weight_map"] if index.is_file() else None
        files = sorted(set(weight_map.values())) if weight_map else [SINGLE]
        holder = {}
        for name in files:
            path = self.folder / name
            if Path(name).name != name or not path.is_file():
                raise CheckpointError(str(path), "no such file", f"a file that {INDEX} names" if weight_map else f"{SINGLE} or {INDEX}", _TODO)
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(str(path), f"{type(error).__name__}: {error}", "a whole safetensors file", _TODO) from error
            holder |= {tensor: (path, file) for tensor in file.keys() if weight_map is None or weight_map.get(tensor) == name}
        if weight_map is not None:
            check_names(holder, weight_map, where=str(index))
        return holder

    def _params(self) -> str:
        """bf16 when all but the router biases are, else fp32, which holds both."""
        types = {name: file.get_slice(name).get_dtype() for name, (_, file) in self._holder.items()}
        for name, kind in types.items():
            if kind not in ("F32", "BF16"):
                raise CheckpointError(f"{self.folder}: {name}", f"data type {kind}", "F32 or BF16", "use the unquantised weights")
        return "bf16" if all(kind == "BF16" for name, kind in types.items() if not name.endswith("_bias")) else "fp32"


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(str(path), str(error), "JSON", _TODO) from error
    if not isinstance(value, dict):
        raise CheckpointError(str(path), type(value).__name__, "a JSON object", _TODO)
    return value
