"""The environment a server process is started with: the only settings SGLang and MKL take no other way."""

import os

BATCH_INVARIANT = "GLM_HOST_BATCH_INVARIANT"

HOST = {
    "SGLANG_PLATFORM": "host",
    "SGLANG_PLUGINS": "glm_host_hooks",
    # two servers and a trainer share the cores: two threads each made one server 13 times slower
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # SGLang decorates small functions with torch.compile: the first request took 4.5 s instead of 0.2 s
    "TORCHDYNAMO_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "SGLANG_EXTERNAL_MODEL_PACKAGE": "glm.platform.host_sglang.models",
}

ALWAYS = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # /health answers at once instead of generating a token and sleeping a second
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
    "PYTHONUNBUFFERED": "1",
}

BITWISE = {
    BATCH_INVARIANT: "1",
    # without it MKL's matrix product of one row depends on how many rows are beside it; AVX512 as tried, AVX2 is not
    "MKL_CBWR": "AVX512,STRICT",
}


def server_environment(platform: str, *, batch_invariant: bool = False, scratch: str | None = None) -> dict[str, str]:
    """This process's environment with what a server on ``platform`` ("host" or "cuda") needs.

    scratch: folder for its temporary files and sockets, which SGLang does not delete.

    batch_invariant (host, Intel with AVX-512): a reply does not depend, bit for bit, on the requests beside it.
    """
    own = HOST | (BITWISE if batch_invariant else {}) if platform == "host" else {}
    inherited = {name: value for name, value in os.environ.items() if platform == "host" or name != "SGLANG_PLATFORM"}
    return inherited | ALWAYS | own | ({"TMPDIR": scratch} if scratch else {})
