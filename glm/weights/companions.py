"""The files beside the weights of a Hugging Face folder: configuration, tokenizer, chat template, licence. Carried byte for byte."""

import json
import shutil
from pathlib import Path

from glm.checkpoint.run_folder import write_json
from glm.errors import CheckpointError
from glm.recipe.sections import Model
from glm.weights.hf_config import exported_config
from glm.weights.hf_folder import CONFIG, INDEX, MANIFEST

CARRIED = "hf"
"""The folder in a checkpoint that holds them."""
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}


def companions(folder: Path) -> list[Path]:
    """Every file of ``folder`` itself that is neither weights, nor their index or manifest, nor hidden; sorted by name."""
    return sorted(
        path for path in Path(folder).iterdir()
        if path.is_file() and path.suffix not in _WEIGHTS and path.name not in (INDEX, MANIFEST) and not path.name.startswith(".")
    )


def carry_companions(hf_folder: Path, checkpoint: Path) -> list[str]:
    """Copies them into ``checkpoint``/hf and returns their names. A link, as a download cache has them, is copied as a file."""
    target = Path(checkpoint) / CARRIED
    target.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(path, target / path.name)).name for path in companions(hf_folder)]


def restore_companions(
    checkpoint: Path, out: Path, shape: Model, *, rotary_base: int, params: str, quantization_config: dict | None = None,
) -> bool:
    """Copies what ``carry_companions`` put into ``checkpoint`` to the folder ``out``; False when there is nothing.

    config.json is the original, byte for byte, where it describes the exported model; see hf_config.exported_config.
    Raises CheckpointError for a config.json that is not JSON.
    """
    carried = Path(checkpoint) / CARRIED
    if not (carried / CONFIG).is_file():
        return False
    for path in companions(carried):
        shutil.copyfile(path, Path(out) / path.name)
    try:
        original = json.loads((carried / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(str(carried / CONFIG), str(error), "JSON", "import the folder again") from error
    config = exported_config(
        original, shape, rotary_base=rotary_base, params=params, quantization_config=quantization_config, where=str(carried / CONFIG),
    )
    if config != original:
        write_json(Path(out) / CONFIG, config)
    return True
