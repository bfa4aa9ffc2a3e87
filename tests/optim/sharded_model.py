"""The parameters of a two-layer GLM-4.5 with given gradients, cut as megatron cuts them: an optimizer's view of a model.

No network is run, so gradients are the same bits under every layout and what is compared is the optimizer alone.
"""

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from glm.optim.build import TrainOptimizer
from glm.recipe.sections import Model, Muon

HIDDEN, INNER, EXPERTS, VOCAB = 24, 20, 4, 28
SHAPE = Model(
    num_layers=2, num_dense_layers=1, hidden_size=HIDDEN, dense_ffn_size=INNER, expert_ffn_size=INNER, num_attention_heads=4,
    num_query_groups=2, head_dim=8, qk_norm=False, routed_scaling_factor=1.0, num_experts=EXPERTS, experts_per_token=2, vocab_size=VOCAB, max_position=64,
)
EMBEDDING = "embedding.word_embeddings.weight"
WHOLE = {EMBEDDING: (VOCAB, HIDDEN)}
for layer in (0, 1):
    WHOLE |= {
        f"decoder.layers.{layer}.input_layernorm.weight": (HIDDEN,),
        f"decoder.layers.{layer}.self_attention.linear_qkv.weight": (2 * (16 + 8 + 8), HIDDEN),
        f"decoder.layers.{layer}.self_attention.linear_qkv.bias": (2 * (16 + 8 + 8),),
        f"decoder.layers.{layer}.self_attention.linear_proj.weight": (HIDDEN, 32),
    }
WHOLE |= {
    "decoder.layers.0.mlp.linear_fc1.weight": (2 * INNER, HIDDEN),
    "decoder.layers.0.mlp.linear_fc2.weight": (HIDDEN, INNER),
    "decoder.layers.1.mlp.router.weight": (EXPERTS, HIDDEN),
    "decoder.layers.1.mlp.experts.weight1": (EXPERTS, 2 * INNER, HIDDEN),
    "decoder.layers.1.mlp.experts.weight2": (EXPERTS, HIDDEN, INNER),
    "mtp.layers.0.eh_proj.weight": (HIDDEN, 2 * HIDDEN),
    "output_layer.weight": (VOCAB, HIDDEN),
}
COLUMN_PARALLEL = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias", "eh_proj.weight")
"""Cut along the rows, as linear_fc1 and experts.weight1 are, which hold gate above up."""


def whole(kind: str, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Every tensor of the model, random by its name and ``kind``."""
    tensors = {}
    for name, shape in WHOLE.items():
        generator = torch.Generator().manual_seed(sum(ord(letter) * (place + 1) for place, letter in enumerate(kind + name)))
        tensors[name] = scale * torch.randn(shape, generator=generator)
    return tensors


def cut_dim(name: str) -> int | None:
    if name.endswith(COLUMN_PARALLEL + ("linear_fc1.weight",)):
        return 0
    return {"weight1": 1, "weight2": 2}.get(name.rsplit(".")[-1], 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else None)


def shard(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor."""
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    if ".experts." in name:
        tensor = tensor.chunk(parallel_state.get_expert_model_parallel_world_size())[parallel_state.get_expert_model_parallel_rank()]
        rank, size = parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_tensor_parallel_world_size()
    dim = cut_dim(name)
    if dim is None or size == 1:
        return tensor.clone()
    if name.endswith(("linear_fc1.weight", "experts.weight1")):
        return torch.cat([half.chunk(size, dim)[rank] for half in tensor.chunk(2, dim)], dim)
    return tensor.chunk(size, dim)[rank].clone()


def held(name: str) -> bool:
    """Whether this pipeline stage has the parameter; the last has the MTP layer and so a copy of the embedding."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return True
    first = name.startswith(("embedding", "decoder.layers.0"))
    return first if parallel_state.is_pipeline_first_stage() else not first or name == EMBEDDING


def parameters(weights: dict[str, torch.Tensor], dtype=torch.float32) -> list[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters with the attributes that megatron and glm.model.experts give them."""
    named = []
    for name, tensor in weights.items():
        if not held(name):
            continue
        parameter = torch.nn.Parameter(shard(name, tensor).to(dtype))
        if ".experts." in name:
            parameter.is_stacked_expert, parameter.allreduce = True, False
        if cut_dim(name) is not None:
            parameter.tensor_model_parallel, parameter.partition_dim = True, cut_dim(name)
        if name == EMBEDDING and not parallel_state.is_pipeline_first_stage():
            parameter.shared_embedding = True
        named.append((name, parameter))
    return named


def optimizer_of(named, **settings) -> TrainOptimizer:
    return TrainOptimizer(named, Muon(**settings), SHAPE)


def train(optimizer: TrainOptimizer, named, steps: range) -> list[float]:
    """Steps with the gradients of ``steps``; returns the norms."""
    norms = []
    for step in steps:
        grads = whole(f"gradient {step}", scale=0.1 if step % 2 else 0.01)  # one step clipped, one not
        for name, parameter in named:
            parameter.main_grad = shard(name, grads[name])
        norms.append(optimizer.step(1e-2))
    return norms


def sharded_model(named) -> dict:
    """As megatron's modules describe themselves to a checkpoint."""
    state = {}
    tensor_rank, tensor_size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    copy_rank = parallel_state.get_data_parallel_group(with_context_parallel=True).rank()
    for name, parameter in named:
        offsets, dim = [], cut_dim(name)
        if ".experts." in name:
            offsets.append((0, parallel_state.get_expert_model_parallel_rank(), parallel_state.get_expert_model_parallel_world_size()))
            replica = (0, 0, parallel_state.get_expert_data_parallel_group().rank())
            assert parallel_state.get_expert_tensor_parallel_world_size() == 1
        elif dim is not None:
            offsets.append((dim, tensor_rank, tensor_size))
            replica = (int(getattr(parameter, "shared_embedding", False)), 0, copy_rank)
        else:
            replica = (0, tensor_rank, copy_rank)
        tensor = ShardedTensor.from_rank_offsets(name, parameter, *offsets, replica_id=replica)
        gated = name.endswith("linear_fc1.weight")
        state[name] = apply_swiglu_sharded_factory(tensor, ()) if gated else tensor
    return state
