"""One server for all tests of this folder, on random weights, with its MTP layer as the draft."""

import asyncio

import pytest
from safetensors.torch import load_file
from tests.tiny_model import random_weights, save_model, tiny_config

from glm.inference.client import EngineClient
from glm.inference.server import EngineServer, ServerSpec


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), tiny_config(), random_weights(tiny_config()))


@pytest.fixture(scope="session")
def other_model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("other"), tiny_config(), random_weights(tiny_config(), seed=1))


@pytest.fixture(scope="session")
def server(model_folder, tmp_path_factory):
    spec = ServerSpec(model_folder, "host", num_draft_steps=3, context_length=256, max_running_requests=64)
    with EngineServer(spec, tmp_path_factory.mktemp("log") / "server.log") as running:
        running.wait_ready(120)
        yield running


@pytest.fixture
def ask(server):
    """Runs a coroutine function with a client of the server: ask(lambda client: client.generate(...))."""

    def run(use, **changes):
        async def go():
            async with EngineClient(server.url, changes.pop("api_key", server.spec.api_key), **changes) as client:
                return await use(client)

        return asyncio.run(go())

    return run


@pytest.fixture
def loaded(ask, model_folder):
    """The server with the weights of ``model_folder``, whatever a test before has pushed; returns its tensors."""
    ask(lambda client: client.update_weights(model_folder, "0"))
    return load_file(model_folder / "model.safetensors")
