"""What the parity tests run on both sides, and how far apart the two may be.

Both sides compute in float32 from the same weights but sum in other orders: a fused or a separate product of q, k and v,
experts one by one or grouped, the softmax of the whole vocabulary or of shards. One sum of n terms rounds by about
sqrt(n) * 6e-8 of its size, and some hundred such sums lie one behind the other between a weight and a logit. The tolerances
are that, with room above the largest differences measured (docs/numerics.md has the table).

Legend: B batch, S sequence, V vocabulary.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Iterator

import torch
import torch.nn.functional as F
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from torch import Tensor

from glm.convert.reference import Reference
from glm.recipe.sections import Model
from glm.train.batch import MicroBatch, plain_batch
from glm.weights.name_map import rows
from tests.model_fixture import ROTARY_BASE, megatron_model, random_hf_weights, random_tokens, write_hf_folder

TOLERANCES = {
    "logits": 1e-5,
    "loss": 1e-6,
    "gradient": 1e-5,
    "gradient of a key bias": 3e-5,
    "router": 1e-6,
}
"""logits: largest difference over the largest logit, also of hidden states. loss: difference of the sums over their size; errors of tokens cancel.
gradient: norm of the difference over the norm, of each tensor; of a key bias it is the remainder of terms that cancel (adding
one vector to every unrotated key changes no softmax), so it carries their rounding errors but not their size. router: largest difference over the weight."""

measured: dict[str, tuple[float, str]] = {}
"""{kind: (largest difference that was accepted in this session, where)}; tests/parity/conftest.py prints it at the end."""


def require(**differences: dict[str, float]) -> None:
    """``kind={where: difference}``. Fails naming the largest of a kind that is above its tolerance; NaN is above."""
    worst = {}
    for kind, by_place in differences.items():
        where = max(by_place, key=lambda place: (by_place[place] != by_place[place], by_place[place]))
        worst[kind] = by_place[where], where
        assert by_place[where] <= TOLERANCES[kind], \
            f"{kind} differs by {by_place[where]:.2e}, tolerance {TOLERANCES[kind]:.0e}: {where}"
    for kind, found in worst.items():  # of a comparison that failed, a twin's for example, nothing counts
        measured[kind] = max(measured.get(kind, found), found)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of ``theirs``."""
    assert ours.shape == theirs.shape, f"{list(ours.shape)} and {list(theirs.shape)}"
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@dataclass(frozen=True)
class Pair:
    """Random weights of one shape, as this suite's model and as transformers'."""

    name: str
    shape: Model
    weights: dict[str, Tensor]
    folder: Path

    @classmethod
    def write(cls, name: str, shape: Model, folder: Path, **weights: Tensor) -> "Pair":
        """``weights`` replace those of ``random_hf_weights``."""
        tensors = random_hf_weights(shape) | weights
        return cls(name, shape, tensors, write_hf_folder(folder, shape, tensors))

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.folder)

    @cached_property
    def token_ids(self) -> Tensor:
        return random_tokens(self.shape)

    @cached_property
    def reference_logits(self) -> Tensor:
        """Of ``token_ids``; a test that changes nothing may share them."""
        with torch.no_grad(), no_near_tie(self.reference.model):
            logits = self.reference.logits(self.token_ids)
        assert 0.3 < logits.std() < 5, "logits of order 1, or the tolerance means nothing"
        return logits

    @cached_property
    def busy_expert(self) -> int:
        """The expert of the last layer that most of ``token_ids`` choose."""
        chosen = []
        router = self.reference.model.model.layers[-1].mlp.gate
        hook = router.register_forward_hook(lambda module, inputs, outputs: chosen.append(outputs[2].flatten()))
        with torch.no_grad():
            self.reference.logits(self.token_ids)
        hook.remove()
        return torch.cat(chosen).bincount().argmax().item()

    def ours(self, *, rotary_base: int = ROTARY_BASE, **changed: Tensor):
        """The megatron model, with other tensors under some names."""
        return megatron_model(self.shape, self.weights | changed, rotary_base=rotary_base)

    def changed(self, name: str, amount: float, *index: int) -> dict[str, Tensor]:
        """{name: that tensor with ``amount`` added to one element}."""
        tensor = self.weights[name].clone()
        tensor[index] += amount
        return {name: tensor}


@contextmanager
def no_near_tie(model: torch.nn.Module, margin: float = 2e-6) -> Iterator[None]:
    """Fails when a router of ``model`` chose by less than ``margin``: two right programs may then choose differently, and no
    tolerance fits. A score of order 1 carries an error of some 1e-7; tests/model/test_router.py has the bound."""
    smallest = [float("inf")]

    def look(router, inputs, outputs):
        if router.top_k < router.num_experts:
            ordered = (outputs[0].sigmoid() + router.e_score_correction_bias).sort(-1, descending=True).values
            smallest.append((ordered[:, router.top_k - 1] - ordered[:, router.top_k]).min().item())

    hooks = [module.register_forward_hook(look) for module in model.modules() if hasattr(module, "e_score_correction_bias")]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    assert min(smallest) > margin, f"a near-tie of {min(smallest):.1e} in this seed's choice of experts: take another seed"


@dataclass(frozen=True)
class Outcome:
    """Of one forward and backward of the summed loss."""

    loss: float
    """Summed over the tokens that count."""
    gradients: dict[str, Tensor]
    """Under the names of the Hugging Face files; a tensor without a gradient has no entry."""
    mtp_loss: float = 0.0

    @property
    def unused(self) -> set[str]:
        """Tensors whose gradient is 0 in every element."""
        return {name for name, gradient in self.gradients.items() if not gradient.any()}


def require_same(ours: Outcome, theirs: Outcome, pair: Pair, what: str = "", rounding_only: tuple[str, ...] = ()) -> None:
    """Same losses and same gradients; a gradient that is exactly 0 on one side is exactly 0 on the other.

    Tensors whose name holds one of ``rounding_only`` have a gradient of 0 in exact arithmetic, and of rounding errors in a
    computer's: they are measured against the largest gradient. With one expert a token the routers are among them, since
    its weight is score / score.
    """
    if pair.shape.experts_per_token == 1:
        rounding_only = (*rounding_only, "mlp.gate.weight")
    zero = {name for name in theirs.gradients if any(part in name for part in rounding_only)}
    what = f"{pair.name}, {what}" if what else pair.name
    assert ours.gradients.keys() == theirs.gradients.keys(), sorted(ours.gradients.keys() ^ theirs.gradients.keys())[:5]
    assert not (odd := (ours.unused ^ theirs.unused) - zero), f"0 on one side: {sorted(odd)[:5]}"
    largest = max(gradient.norm() for gradient in theirs.gradients.values())
    kinds = {"gradient": {}, "gradient of a key bias": {}, "loss": {what: abs(ours.loss - theirs.loss) / theirs.loss}}
    for name, gradient in theirs.gradients.items():
        if name not in theirs.unused:
            error = ((ours.gradients[name] - gradient).norm() / (largest if name in zero else gradient.norm())).item()
            kinds["gradient of a key bias" if name.endswith("k_proj.bias") else "gradient"][f"{what}, {name}"] = error
    if theirs.mtp_loss:
        kinds["loss"][f"{what}, MTP"] = abs(ours.mtp_loss - theirs.mtp_loss) / theirs.mtp_loss
    require(**kinds)


def next_tokens(token_ids_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(token_ids, labels, mask) [B, S]: every token predicts the next, the last of a row nothing."""
    mask = torch.ones(token_ids_BS.shape)
    mask[:, -1] = 0
    return token_ids_BS, token_ids_BS.roll(-1, 1), mask


def our_outcome(model, shape: Model, batch: MicroBatch | tuple[Tensor, Tensor, Tensor], *, mtp_weight: float = 0.0) -> Outcome:
    """megatron's, of a micro-batch as the trainer makes it; the gradient is of loss + mtp_weight * MTP loss."""
    if isinstance(batch, tuple):
        batch = plain_batch(*map(list, batch), torch.device("cpu"))
    model.mtp_weight = mtp_weight
    model.zero_grad()
    MTPLossAutoScaler.set_loss_scale(torch.ones(1))  # of the process: a Trainer before us leaves 1 / its tokens
    losses = model(
        input_ids=batch.token_ids, position_ids=batch.position_ids, attention_mask=None, labels=batch.labels,
        loss_mask=batch.loss_mask, packed_seq_params=batch.documents,
    )
    total = (losses * batch.loss_mask).sum()
    total.backward()
    parameters, gradients = dict(model.named_parameters()), {}
    for row in rows(shape):
        if not row.is_router_bias and (gradient := parameters[row.megatron].grad) is not None:
            gradients |= zip(row.names(range(shape.num_experts)), row.transform.to_hf(gradient, shape))
    return Outcome(total.item(), gradients, model.take_mtp_loss()[0].item())


def their_outcome(reference: Reference, *batches: tuple[Tensor, Tensor, Tensor], mtp_weight: float = 0.0) -> Outcome:
    """transformers', of (token_ids, labels, mask) that do not see each other; the MTP loss by its own MTP model."""
    reference.model.zero_grad()
    if reference.mtp is not None:
        reference.mtp.zero_grad()
    total, ahead = torch.zeros(()), torch.zeros(())
    with no_near_tie(reference.model):
        for token_ids, labels, mask in batches:
            losses = F.cross_entropy(reference.logits(token_ids).flatten(0, 1), labels.flatten(), reduction="none")
            total = total + (losses * mask.flatten()).sum()
            if mtp_weight and token_ids.shape[1] > 2:
                ahead = ahead + reference.mtp_losses(token_ids).sum()
    (total + mtp_weight * ahead).backward()
    return Outcome(total.item(), their_gradients(reference, with_mtp=bool(mtp_weight)), ahead.item())


def their_gradients(reference: Reference, *, with_mtp: bool) -> dict[str, Tensor]:
    """Gradients under the names of the files: transformers stacks the experts in memory, and has names of its own for MTP."""
    found = {name: parameter.grad for name, parameter in reference.model.named_parameters()}
    if with_mtp:
        prefix = f"model.layers.{reference.model.config.num_hidden_layers}."
        for name, parameter in reference.mtp.layers[0].named_parameters():
            found[prefix + name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")] = parameter.grad
    return stacked_to_files({name: gradient for name, gradient in found.items() if gradient is not None})


def stacked_to_files(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """``found`` with the stacked experts that transformers has in memory as one tensor each; empty tensors are left out."""
    gradients = {}
    for name, gradient in found.items():
        if not gradient.numel():  # the shared experts of a model with none
            continue
        prefix = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(gradient):
                gate, up = both.chunk(2)
                gradients |= {f"{prefix}.{expert}.gate_proj.weight": gate, f"{prefix}.{expert}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            gradients |= {f"{prefix}.{expert}.down_proj.weight": down for expert, down in enumerate(gradient)}
        else:
            gradients[name] = gradient
    return gradients
