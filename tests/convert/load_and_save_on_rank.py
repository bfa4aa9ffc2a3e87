"""One rank of test_layouts: loads a converted checkpoint, compares with the folder it came from, and saves it as training does."""

import json
import sys
from pathlib import Path

from glm import platform


def main(hf: Path, checkpoint: Path, out: Path, ranks: int, layout: dict) -> None:
    platform.activate("host")

    import torch

    from glm import runtime as runtimes
    from glm.checkpoint import store
    from glm.model.build import build_chunks
    from glm.model.chunks import named_tensors
    from glm.model.config import transformer_config
    from glm.recipe.schema import StageRecipe
    from glm.recipe.sections import Layout
    from glm.weights.gather import load_hf_tensors
    from glm.weights.hf_reader import HFFolder

    folder = HFFolder(hf)
    shape, params = folder.shape, folder.params
    runtime = runtimes.start(StageRecipe(
        name="test", stage="test", main="none", run_folder=str(out), model=shape, platform="host", layout=Layout(**layout),
        launcher={"ranks_per_node": ranks},
    ))
    config = transformer_config(shape, params=params, layout=Layout(**layout))
    chunks = build_chunks(config, shape, rotary_base=folder.rotary_base)
    load_hf_tensors(chunks, shape, folder.get)
    expected = {name: tensor.clone() for name, tensor in named_tensors(chunks).items()}
    for tensor in named_tensors(chunks).values():
        tensor.fill_(float("nan"))
    store.load(checkpoint, chunks)
    found = named_tensors(chunks)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert found.keys() == expected.keys() and not different, f"rank {runtime.rank}: {different}"
    info = store.CheckpointInfo(stage="test", step=1, stage_tokens=0, run_tokens=0, rotary_base=folder.rotary_base)
    store.save(out, info, shape, chunks, None, runtime, keep=1)
    runtimes.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), json.loads(sys.argv[5]))
