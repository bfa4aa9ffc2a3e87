"""The real model under any layout, with gradients that are given instead of computed.

They are the same bits under every layout, so that what is compared is the optimizer alone.
"""

import hashlib

import torch
from megatron.core import parallel_state

from glm.model.build import build_chunks
from glm.model.chunks import named_parameters
from glm.model.config import transformer_config
from glm.model.initialize import initialize
from glm.model.shards import shard_of
from glm.optim.build import TrainOptimizer
from glm.recipe.sections import AdamWAlone, Layout, Model, Muon

SHAPE = Model(
    num_layers=4, num_dense_layers=1, hidden_size=32, dense_ffn_size=40, expert_ffn_size=24, num_attention_heads=4,
    num_query_groups=2, head_dim=8, qk_norm=True, routed_scaling_factor=2.5, num_experts=4, experts_per_token=2,
    num_mtp_layers=1, vocab_size=64, max_position=64, init_std=0.1,
)


class Case:
    """Model and optimizer of this rank."""

    def __init__(self, layout: dict[str, int], params: str = "fp32", seed: int = 0, settings: Muon | AdamWAlone = Muon()):
        config = transformer_config(SHAPE, params=params, layout=Layout(**layout))
        self.chunks = build_chunks(config, SHAPE, rotary_base=10_000)
        initialize(self.chunks, seed=seed, shape=SHAPE)
        self.named = named_parameters(self.chunks)
        self.optimizer = TrainOptimizer(self.named, settings, SHAPE)

    def train(self, steps: range) -> list[float]:
        """Steps with the gradients of ``steps``, every other one small enough not to be clipped; returns the norms."""
        norms = []
        for step in steps:
            for name, parameter in self.named:
                parameter.main_grad = self.own(name, gradient(name, self.whole_shape(name, parameter), step))
            norms.append(self.optimizer.step(1e-2))
        return norms

    def whole_shape(self, name: str, parameter: torch.Tensor) -> list[int]:
        shape = shard_of(name, parameter).whole_shape(parameter.shape)
        if ".experts." in name:
            shape[0] *= parallel_state.get_expert_model_parallel_world_size()
        return shape

    def own(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor of the whole model."""
        if ".experts." in name:
            whole = whole.chunk(parallel_state.get_expert_model_parallel_world_size())[parallel_state.get_expert_model_parallel_rank()]
        return shard_of(name, dict(self.named)[name]).cut(whole).clone()

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.named}

    @property
    def state_numbers(self) -> int:
        """How many numbers of optimizer state this rank keeps."""
        return sum(tensor.numel() for _, _, tensor in self.optimizer._state())


def gradient(name: str, shape: list[int], step: int) -> torch.Tensor:
    """Of the whole tensor ``name``."""
    seed = int.from_bytes(hashlib.sha256(f"{step}/{name}".encode()).digest()[:7], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * (0.1 if step % 2 else 0.001)
