"""One rank of test_gather: loads weights from a folder, exports them, writes what came out, and saves a checkpoint."""

import sys
from pathlib import Path

from glm import platform


def main(folder: Path, out: Path, ep: int) -> None:
    platform.activate("host")

    from safetensors.torch import save_file

    from glm import runtime as runtimes
    from glm.checkpoint import store
    from glm.model.build import build_chunks
    from glm.model.config import transformer_config
    from glm.recipe.schema import StageRecipe
    from glm.recipe.sections import Layout
    from glm.weights.gather import hf_tensors, load_hf_tensors
    from glm.weights.hf_reader import HFFolder

    weights = HFFolder(folder)
    shape, layout = weights.shape, Layout(ep=ep)
    runtime = runtimes.start(StageRecipe(
        name="test", stage="test", main="none", run_folder=str(out), model=shape, platform="host", layout=layout,
        launcher={"ranks_per_node": ep},
    ))
    asked = []
    chunks = build_chunks(transformer_config(shape, layout=layout), shape, rotary_base=weights.rotary_base)
    load_hf_tensors(chunks, shape, lambda name: (asked.append(name), weights.get(name))[1])
    experts = {name.split(".experts.")[1].split(".")[0] for name in asked if ".mlp.experts." in name}
    assert len(experts) == shape.num_experts // ep, f"rank {runtime.rank} read experts {sorted(experts)}"
    on_first = {name: tensor.clone() for name, tensor in hf_tensors(chunks, shape)}
    assert bool(on_first) == runtime.is_first
    if runtime.is_first:
        save_file(on_first, out / "first.safetensors")
    info = store.CheckpointInfo(stage="test", step=1, stage_tokens=0, run_tokens=0, rotary_base=weights.rotary_base)
    store.save(out / "checkpoints", info, shape, chunks, None, runtime, keep=1)
    runtimes.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
