"""Five steps of training under one layout on these ranks: losses, the first step's gradients and the last weights, on rank 0."""

from dataclasses import dataclass

import torch
from torch import Tensor

from glm import runtime as runtimes
from glm.model.chunks import named_parameters
from glm.recipe.schema import TrainRecipe
from glm.train.batch import MicroBatch, packed_batch, plain_batch
from glm.train.loop import share
from glm.train.losses import next_token_loss
from glm.train.step import Trainer
from glm.weights.gather import hf_tensors
from tests.layout.cases import DOCUMENTS, LENGTH, ROWS, SEED, STEPS, Case
from tests.model_fixture import tiny_shape

SHAPE = tiny_shape(vocab_size=321)


@dataclass(frozen=True)
class Trained:
    """What a layout gave. Tensors under Hugging Face names, on rank 0 only."""

    losses: list[float]
    mtp_losses: list[float]
    gradients: dict[str, Tensor]
    """Of the first step."""
    weights: dict[str, Tensor]
    """After the last."""
    late_gradients: dict[str, Tensor]
    """Of one step more."""
    evaluation: float
    """Loss of the trained weights on the batch of that step, without a gradient."""
    load: list[list[float]]
    margin: float
    """Smallest gap, over all tokens, layers and steps, between the last expert chosen and the first one not (of this rank)."""


def trainer(case: Case, **changes) -> tuple[Trainer, runtimes.Runtime]:
    """A trainer of the tiny shape under ``case``, its process groups made anew."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    recipe = TrainRecipe(**{
        "name": "layout", "stage": "layout", "main": "pretrain.train", "run_folder": "unused", "model": SHAPE, "platform": "host",
        "launcher": {"ranks_per_node": case.ranks}, "layout": case.layout, "sequence_length": LENGTH, "rotary_base": 10_000,
        "batch": {"tokens": ROWS * LENGTH, "micro_batch_size": case.micro_batch}, "tokens": ROWS * LENGTH,
        "schedule": {"peak_lr": 1e-2, "final_lr": 1e-2}, "precision": {"params": "fp32"}, "kernels": {"attention": "sdpa"},
        "losses": {"sequence_balance_weight": 1e-2},
        # AdamW divides by the root of the squared gradient: with its usual eps the sign of a gradient that is only rounding decides
        # a whole step. This eps makes the update a smooth function of the gradient.
        "optimizer": {"adamw": {"eps": 1e-3}},
        "data": {"mixture": "unused", "sources": {"prose": {"corpus": "prose", "share": 1.0}}},
    } | changes)
    runtime = runtimes.start(recipe)
    return Trainer(recipe), runtime


def batches(case: Case, runtime: runtimes.Runtime, step: int) -> list[MicroBatch]:
    """This data-parallel rank's micro-batches of the global batch of ``step``; some tokens are masked."""
    generator = torch.Generator().manual_seed(1000 * SEED[case.packed] + step)
    ids = torch.randint(SHAPE.vocab_size, (ROWS, LENGTH + 1), generator=generator)
    masks = (torch.rand(ROWS, LENGTH, generator=generator) > 0.2).float()
    if case.bare:
        masks.fill_(1)
    first, count = share(0, ROWS, runtime)
    made = []
    for at in range(first, first + count, case.micro_batch):
        rows = slice(at, at + case.micro_batch)
        tensors = [list(ids[rows, :-1]), list(ids[rows, 1:]), list(masks[rows])]
        extra = {"source": [torch.full((LENGTH,), row % 2) for row in range(at, at + case.micro_batch)]}
        if case.packed:
            lengths = [length for row in range(at, at + case.micro_batch) for length in DOCUMENTS[row % len(DOCUMENTS)]]
            made.append(packed_batch(*tensors, lengths, torch.device("cpu"), extra))
        else:
            made.append(plain_batch(*tensors, torch.device("cpu"), extra))
    return made


def train(case: Case, **changes) -> Trained:
    """Runs ``case`` on all ranks."""
    one, runtime = trainer(case, **changes)
    gaps = watch_margins(one)
    mtp_weight = 0.0 if case.bare else 0.3
    gradients = first_gradients(one, batches(case, runtime, 0), mtp_weight)
    outcomes = [
        one.step(batches(case, runtime, step), next_token_loss, lr=1e-2, mtp_weight=mtp_weight, bias_update_rate=1e-3)
        for step in range(STEPS)
    ]
    weights = {name: tensor.clone() for name, tensor in hf_tensors(one.chunks, SHAPE)}
    late = first_gradients(one, batches(case, runtime, STEPS), mtp_weight)
    return Trained(
        losses=[outcome.metrics["loss"] for outcome in outcomes], mtp_losses=[outcome.mtp_loss for outcome in outcomes],
        gradients=gradients, weights=weights, late_gradients=late,
        evaluation=one.evaluate(batches(case, runtime, STEPS), next_token_loss)["loss"],
        load=outcomes[-1].load, margin=min(gaps, default=1.0),
    )


def first_gradients(one: Trainer, micro_batches: list[MicroBatch], mtp_weight: float) -> dict[str, Tensor]:
    """The gradient of a step before the optimizer scales it; the step itself is not done."""
    one.accumulate(micro_batches, next_token_loss, mtp_weight=mtp_weight, bias_update_rate=0.0)
    for chunk in one.chunks:
        chunk.take_mtp_loss()
    return gathered_gradients(one)


def watch_margins(one: Trainer) -> list[float]:
    """Grows by the smallest gap of each call of a router."""
    gaps: list[float] = []

    def note(router, inputs, output):
        with torch.no_grad():
            chosen = (torch.sigmoid(router.gating(inputs[0])) + router.expert_bias).sort(-1, descending=True).values
            gaps.append((chosen[..., SHAPE.experts_per_token - 1] - chosen[..., SHAPE.experts_per_token]).min().item())

    for _, router in one.routers:
        router.register_forward_hook(note)
    return gaps


def gathered_gradients(one: Trainer) -> dict[str, Tensor]:
    """``main_grad`` of every parameter by the way that weights take to rank 0."""
    named = named_parameters(one.chunks)
    kept = [parameter.data for _, parameter in named]
    for _, parameter in named:
        parameter.data = parameter.main_grad
    gradients = {
        name: tensor.clone() for name, tensor in hf_tensors(one.chunks, SHAPE) if not name.endswith("e_score_correction_bias")
    }
    for (_, parameter), data in zip(named, kept):
        parameter.data = data
    return gradients
