"""With batch_invariant a reply does not depend on the requests beside it, bit for bit."""

import asyncio
from pathlib import Path

import pytest
from tests.tiny_model import random_weights, save_model, tiny_config

from glm.errors import PlatformError
from glm.inference.client import EngineClient, Sampling
from glm.inference.server import EngineServer, ServerSpec

CPU = Path("/proc/cpuinfo")
PROBE, GREEDY = [5, 6, 7, 8, 9], Sampling(0.0, 24)


@pytest.mark.skipif(not CPU.exists() or "avx512f" not in CPU.read_text(), reason="tried on AVX-512 only")
def test_a_reply_is_bitwise_the_same_alone_and_in_a_batch(tmp_path):
    config = tiny_config(n_routed_experts=32)
    folder = save_model(tmp_path / "model", config, random_weights(config))
    spec = ServerSpec(folder, "host", num_draft_steps=2, context_length=256, batch_invariant=True)

    async def compare(server):
        async with EngineClient(server.url, server.spec.api_key) as client:
            alone = await client.generate(PROBE, GREEDY)
            await client.flush_cache()
            crowd = [[(i * 7 + j) % 250 for j in range(3 + i % 40)] for i in range(31)]
            beside = (await client.generate_batch([*crowd, PROBE], GREEDY))[-1]
            return alone, beside

    with EngineServer(spec, tmp_path / "log") as server:
        server.wait_ready(120)
        alone, beside = asyncio.run(compare(server))
    assert alone.token_ids == beside.token_ids
    assert alone.logprobs == beside.logprobs


def test_a_model_whose_router_is_not_invariant_is_refused(model_folder, tmp_path):
    with pytest.raises(PlatformError, match="8 experts"):
        EngineServer(ServerSpec(model_folder, "host", batch_invariant=True), tmp_path / "log").start()
