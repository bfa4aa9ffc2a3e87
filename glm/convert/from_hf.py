"""A Hugging Face folder as a checkpoint to train on."""

from pathlib import Path

from tqdm import tqdm

from glm.checkpoint import store
from glm.errors import CheckpointError
from glm.weights import one_rank
from glm.weights.gather import load_hf_tensors
from glm.weights.hf_reader import HFFolder
from glm.weights.name_map import hf_names

STAGE = "from_hf"


def from_hf(hf_folder: Path, checkpoint_folder: Path, *, platform: str = "host", params: str | None = None) -> Path:
    """Writes ``checkpoint_folder``/step_00000000: the weights of ``hf_folder`` without an optimizer state.

    ``params`` (fp32 or bf16): the type to store; by default the folder's own. Raises CheckpointError for a folder that is
    torn, of another network, or whose tensors are not exactly the model's; and if checkpoints are there already.
    """
    checkpoint_folder = Path(checkpoint_folder)
    there = store.checkpoint_steps(checkpoint_folder)
    if there:
        raise CheckpointError(
            str(checkpoint_folder), f"{len(there)} checkpoints, up to step {there[-1]}", "a folder without checkpoints",
            "choose a new folder",
        )
    with HFFolder(hf_folder) as folder:
        folder.check_copies()
        shape = folder.shape
        runtime = one_rank.start(shape, platform=platform)
        model = one_rank.build(shape, params=params or folder.params, rotary_base=folder.rotary_base)
        with tqdm(total=len(hf_names(shape)), desc="import", unit="tensor", disable=None) as bar:
            def get(name: str):
                bar.update()
                return folder.get(name)

            load_hf_tensors([model], shape, get)
        info = store.CheckpointInfo(stage=STAGE, step=0, stage_tokens=0, run_tokens=0, rotary_base=folder.rotary_base)
        return store.save(checkpoint_folder, info, shape, [model], None, runtime, keep=1)
