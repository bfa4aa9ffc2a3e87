"""The trainer's own forward and backward against transformers: what stands in the gradient buffers before the optimizer steps.

The other files of this folder ask the model for gradients through autograd. A training run takes another way: micro-batches
of unequal length, sums divided by the tokens of the batch, weight gradients added in place (glm.model.gradients).
"""

import pytest
import torch

from glm.model.chunks import named_parameters
from glm.recipe.schema import TrainRecipe
from glm.train.batch import packed_batch, plain_batch
from glm.train.losses import next_token_loss
from glm.train.step import Trainer
from glm.weights import one_rank
from glm.weights.gather import load_hf_tensors
from glm.weights.name_map import rows
from tests.model_fixture import ROTARY_BASE, random_tokens
from tests.parity.compare import Outcome, Pair, next_tokens, require_same, their_outcome
from tests.parity.shapes import QUICK

CPU = torch.device("cpu")
MTP_WEIGHT = 0.3
DIFFERS = "differs by|0 on one side"
KERNELS = ["host", pytest.param("grouped_mm", marks=pytest.mark.full)]
"""The other files of this folder run grouped_mm."""


@pytest.fixture(scope="module", params=QUICK)
def pair(request, tmp_path_factory) -> Pair:
    return Pair.write(request.param, QUICK[request.param], tmp_path_factory.mktemp("model"))


def trainer_outcome(pair: Pair, micro_batches, experts: str, **changed) -> Outcome:
    """Sums over the tokens, of what the trainer accumulates as means."""
    one_rank.start(pair.shape, platform="host")
    trainer = Trainer(TrainRecipe(**{
        "name": "test", "stage": "test", "main": "pretrain.train", "run_folder": "unused", "model": pair.shape, "platform": "host",
        "sequence_length": 64, "rotary_base": ROTARY_BASE, "batch": {"tokens": 64}, "tokens": 64,
        "schedule": {"peak_lr": 1e-3, "final_lr": 1e-3}, "precision": {"params": "fp32"},
        "kernels": {"attention": "sdpa", "experts": experts}, "losses": {"sequence_balance_weight": 0.0},
        "data": {"mixture": "unused", "sources": {"prose": {"corpus": "prose", "share": 1.0}}},
    }))
    load_hf_tensors(trainer.chunks, pair.shape, (pair.weights | changed).__getitem__)
    total, tokens = trainer.accumulate(micro_batches, next_token_loss, mtp_weight=MTP_WEIGHT, bias_update_rate=0.0)["loss"].tolist()
    parameters, gradients = dict(named_parameters(trainer.chunks)), {}
    for row in rows(pair.shape):
        if not row.is_router_bias:
            parts = row.transform.to_hf(parameters[row.megatron].main_grad * tokens, pair.shape)
            gradients |= zip(row.names(range(pair.shape.num_experts)), parts)
    return Outcome(total, gradients, sum(chunk.take_mtp_loss() for chunk in trainer.chunks)[0].item())


@pytest.mark.parametrize("experts", KERNELS)
def test_the_trainers_gradient_buffers_hold_the_gradients_of_transformers(pair, experts):
    """Two micro-batches of plain rows and one pack, of three lengths."""
    plain = [next_tokens(random_tokens(pair.shape, batch, length, seed)) for batch, length, seed in ((2, 24, 1), (1, 40, 2))]
    lengths = [20, 1, 30, 3]
    documents = [next_tokens(document) for document in random_tokens(pair.shape, 1, sum(lengths), seed=3).split(lengths, dim=1)]
    micro_batches = [plain_batch(*map(list, rows_), CPU) for rows_ in plain]
    micro_batches.append(packed_batch(*([row[0] for row in column] for column in zip(*documents)), lengths, CPU))
    expected = their_outcome(pair.reference, *plain, *documents, mtp_weight=MTP_WEIGHT)
    require_same(trainer_outcome(pair, micro_batches, experts), expected, pair, f"trainer, {experts}")
    prefix = f"model.layers.{pair.shape.num_layers}"
    twin = pair.changed(f"{prefix}.eh_proj.weight", 1e-2, 0, 0)
    with pytest.raises(AssertionError, match=DIFFERS):
        require_same(trainer_outcome(pair, micro_batches, experts, **twin), expected, pair)
