"""Tiny models for tests: shapes, random Hugging Face weights, and the megatron model filled with them, on one rank.

The weights come from transformers' own save_pretrained, so their names owe nothing to the table under test. No value is one a
fault could hide behind: biases are not 0, norm weights not 1, the router bias moves the choice of experts.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Glm4MoeConfig

from glm.recipe.sections import Model
from glm.weights import one_rank
from tests.tiny_model import random_weights

ROTARY_BASE = 10_000


def tiny_shape(**changes) -> Model:
    """4 layers, 1 of them dense, as 355B has it: QK-norm and routed weights scaled by 2.5."""
    return Model(**{
        "num_layers": 4, "num_dense_layers": 1, "hidden_size": 64, "dense_ffn_size": 128, "expert_ffn_size": 32,
        "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 32, "qk_norm": True, "num_experts": 8, "experts_per_token": 2,
        "routed_scaling_factor": 2.5, "num_mtp_layers": 1, "vocab_size": 320, "max_position": 512,
    } | changes)


SHAPES = {
    "355b": tiny_shape(),
    "air": tiny_shape(qk_norm=False, routed_scaling_factor=1.0),
    # head_dim * heads is not hidden_size, 3 dense layers, one key/value head, a quarter rotated, 3 of 6 experts, 2 shared
    "odd": tiny_shape(
        num_dense_layers=3, hidden_size=48, head_dim=24, num_attention_heads=6, num_query_groups=1, rotary_percent=0.25,
        num_experts=6, experts_per_token=3, num_shared_experts=2, routed_scaling_factor=1.7, norm_epsilon=1e-3, vocab_size=200,
    ),
}


def transformers_config(shape: Model, **changes) -> Glm4MoeConfig:
    """Written out by hand, not by glm.weights.hf_config."""
    return Glm4MoeConfig(**{
        "vocab_size": shape.vocab_size, "hidden_size": shape.hidden_size, "intermediate_size": shape.dense_ffn_size,
        "moe_intermediate_size": shape.expert_ffn_size, "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads, "num_key_value_heads": shape.num_query_groups, "head_dim": shape.head_dim,
        "partial_rotary_factor": shape.rotary_percent, "rope_theta": float(ROTARY_BASE), "n_routed_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token, "n_shared_experts": shape.num_shared_experts,
        "first_k_dense_replace": shape.num_dense_layers, "routed_scaling_factor": shape.routed_scaling_factor,
        "use_qk_norm": shape.qk_norm, "attention_bias": True, "max_position_embeddings": shape.max_position,
        "rms_norm_eps": shape.norm_epsilon, "num_nextn_predict_layers": shape.num_mtp_layers, "initializer_range": 0.1,
        "eos_token_id": None, "pad_token_id": None, "dtype": "float32",
    } | changes)


def random_hf_weights(shape: Model, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of an exported model, float32; logits are of order 1."""
    tensors = random_weights(transformers_config(shape), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensors[name] = 1 + 0.2 * torch.randn(tensor.shape, generator=generator)
        elif name.endswith("bias"):  # the router's among them, small enough that every expert gets tokens
            scale = 0.05 if name.endswith("correction_bias") else 0.2
            tensors[name] = scale * torch.randn(tensor.shape, generator=generator)
    return tensors


def write_hf_folder(folder: Path, shape: Model, tensors: dict[str, Tensor], **config) -> Path:
    """A folder as transformers writes it, without this suite's writer."""
    folder.mkdir(parents=True, exist_ok=True)
    made = transformers_config(shape, **config)
    made.architectures = ["Glm4MoeForCausalLM"]
    made.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def megatron_model(shape: Model, tensors: dict[str, Tensor] | None = None, *, params: str = "fp32", rotary_base: int = ROTARY_BASE):
    """The megatron model on one rank: filled with ``tensors``, or with initial weights."""
    one_rank.start(shape, platform="host")
    model = one_rank.build(shape, params=params, rotary_base=rotary_base)
    if tensors is None:
        from glm.model.initialize import initialize

        initialize([model], seed=0, shape=shape)
    else:
        from glm.weights.gather import load_hf_tensors

        load_hf_tensors([model], shape, tensors.__getitem__)
    return model


def random_tokens(shape: Model, batch: int = 2, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(shape.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
