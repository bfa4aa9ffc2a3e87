"""python -m tests.weights.sglang_load OUT FOLDER...: what SGLang's own loader makes of folders, for the target and its draft.

Runs in a process with SGLang's host platform. Builds the real models and loads them; no kernel runs. Saves for each folder
every parameter, named target.* or draft.*, as SGLang holds it before it prepares the weights for a kernel; or the words of
the ValueError with which SGLang refused the folder.
"""

import socket
import sys

import torch
from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.configs.load_config import LoadConfig  # noqa: E402  the plug-ins come first
from sglang.srt.configs.model_config import ModelConfig  # noqa: E402
from sglang.srt.distributed.bootstrap import init_layer_runtime  # noqa: E402
from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel  # noqa: E402
from sglang.srt.layers.dp_attention import initialize_dp_attention  # noqa: E402
from sglang.srt.layers.moe.utils import initialize_moe_config  # noqa: E402
from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config  # noqa: E402
from sglang.srt.model_executor import model_runner  # noqa: E402,F401  importing it initialises the platform
from sglang.srt.model_loader import loader  # noqa: E402
from sglang.srt.model_loader.utils import set_default_torch_dtype  # noqa: E402
from sglang.srt.runtime_context import SpawnRanks, publish  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402


def publish_arguments(folder: str) -> ServerArgs:
    arguments = ServerArgs(model_path=folder, device="cpu", dtype="bfloat16", attention_backend="host_sdpa")
    arguments.resolve_once()
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    return arguments


def start(folder: str) -> None:
    """One rank; importing SGLang takes longer than everything else, so one process loads all folders."""
    arguments = publish_arguments(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    init_distributed_environment(backend="gloo", world_size=1, rank=0, local_rank=0, distributed_init_method=address)
    initialize_model_parallel()
    initialize_dp_attention(arguments)
    initialize_moe_config()
    initialize_fp8_gemm_config()


def load(arguments: ServerArgs, *, draft: bool) -> dict[str, torch.Tensor]:
    config, how = ModelConfig.from_server_args(arguments, is_draft_model=draft), LoadConfig()
    init_layer_runtime(model_config=config)
    with set_default_torch_dtype(torch.bfloat16):
        model = loader._initialize_model(config, how, loader._get_quantization_config(config, how))
    for parameter in model.parameters():  # what is not loaded would show
        if parameter.dtype.itemsize > 1:
            parameter.data.fill_(float("nan"))
    weights = loader.DefaultModelLoader(how)._get_all_weights(config, model)
    loader.DefaultModelLoader.load_weights_only(model, weights, torch.device("cpu"))
    return {f"{'draft' if draft else 'target'}.{name}": parameter.data for name, parameter in model.named_parameters()}


def outcome(folder: str) -> dict[str, torch.Tensor] | str:
    arguments = publish_arguments(folder)
    try:
        return load(arguments, draft=False) | load(arguments, draft=True)
    except ValueError as refusal:
        return str(refusal)


if __name__ == "__main__":
    start(sys.argv[2])
    torch.save({folder: outcome(folder) for folder in sys.argv[2:]}, sys.argv[1])
