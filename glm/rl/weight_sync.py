"""Weights from the trainer to the engines, each push proved.

All training ranks take part in the gathering; rank 0 writes a Hugging Face folder in memory, tells the engines to load
it, and compares the digest of every tensor of target and draft on both sides. A push is complete or it is an error.
"""

import asyncio
import hashlib
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from glm.inference.client import EngineClient
from glm.inference.engine_layout import compare, expected_digests
from glm.model.config import DTYPES
from glm.platform import active
from glm.recipe.schema import RLRecipe
from glm.runtime import Runtime
from glm.train.step import Trainer
from glm.weights.gather import hf_tensors
from glm.weights.hf_folder import write_folder


@dataclass(frozen=True)
class Push:
    """What one push cost."""

    seconds: float
    bytes: int
    tensors: int
    """Tensors proved equal, over all engines, target and draft."""


class WeightSync:
    """Publishes versions of the policy. On ranks other than 0 only the gathering happens."""

    def __init__(self, recipe: RLRecipe, tokenizer_folder: Path, runtime: Runtime):
        self.recipe, self.tokenizer_folder, self.runtime = recipe, tokenizer_folder, runtime
        # Named after the run, so that what a killed process left is found and replaced.
        run = hashlib.sha256(f"{Path(recipe.run_folder).resolve()}/{recipe.stage}".encode()).hexdigest()[:12]
        self._memory = Path(active().memory_folder or tempfile.gettempdir()) / f"glm-weights-{run}"
        if runtime.is_first:
            self.close()
        self._tensors: dict[str, torch.Tensor] = {}

    @property
    def folder(self) -> Path:
        """Where the engines read the weights (rank 0)."""
        return self._memory / "model"

    def export(self, trainer: Trainer) -> None:
        """Gathers the weights of all ranks into ``folder``."""
        tensors = dict(hf_tensors(trainer.chunks, self.recipe.model))
        if self.runtime.is_first:
            self._tensors = tensors
            write_folder(
                self.folder, tensors.items(), self.recipe.model, rotary_base=self.recipe.rotary_base,
                tokenizer=self.tokenizer_folder,
            )

    def push(self, trainer: Trainer, clients: list[EngineClient], version: int) -> Push:
        """Exports, loads and proves ``version`` on every engine. Raises EngineError naming each tensor that differs."""
        started = time.perf_counter()
        self.export(trainer)
        if not self.runtime.is_first:
            return Push(time.perf_counter() - started, 0, 0)
        proved = asyncio.get_event_loop().run_until_complete(self._load_and_prove(clients, version))
        size = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())
        return Push(time.perf_counter() - started, size * len(clients), proved)

    def prove(self, clients: list[EngineClient]) -> int:
        """Compares the engines with the last export; returns how many tensors were equal."""
        return asyncio.get_event_loop().run_until_complete(self._prove(clients))

    def close(self) -> None:
        if self.runtime.is_first:
            shutil.rmtree(self._memory, ignore_errors=True)

    async def _load_and_prove(self, clients: list[EngineClient], version: int) -> int:
        await asyncio.gather(*(client.update_weights(self.folder, str(version)) for client in clients))
        return await self._prove(clients)

    async def _prove(self, clients: list[EngineClient]) -> int:
        expected = expected_digests(
            self._tensors, self.recipe.model.num_layers, dtype=DTYPES[self.recipe.precision.params],
            has_draft=self.recipe.engine.speculative.num_steps > 0,
        )
        for client, found in zip(clients, await asyncio.gather(*(client.weight_digests() for client in clients))):
            compare(expected, found, where=f"weights of the engine at {client.url}")
        return len(clients) * sum(len(tensors) for tensors in expected.values())
