"""Our MTP layer against transformers' own MTP model, and against the report's formula written out by hand.

transformers runs its MTP model for drafting only; with the loss of the report (token t + 2 from the trunk at t and the
embedding of t + 1) its gradients are what ours must be. The formula, made from transformers' layers, owes nothing to that model.
SGLang's draft: test_sglang_draft.py.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import Glm4MoeForCausalLM

from glm.convert.verify import mtp_loss
from glm.recipe.sections import Model
from tests.model_fixture import random_tokens, tiny_shape, transformers_config
from tests.parity.compare import (
    TOLERANCES, Outcome, Pair, next_tokens, our_outcome, require_same, stacked_to_files, their_outcome,
)
from tests.parity.shapes import QUICK, VARIANTS, grid

WEIGHT = 0.3
DIFFERS = "differs by|0 on one side"


@pytest.fixture(scope="module", params=QUICK)
def pair(request, tmp_path_factory) -> Pair:
    return Pair.write(request.param, QUICK[request.param], tmp_path_factory.mktemp("model"))


def ours(pair: Pair, token_ids, **changed) -> Outcome:
    return our_outcome(pair.ours(**changed), pair.shape, next_tokens(token_ids), mtp_weight=WEIGHT)


def changes(pair: Pair) -> dict[str, dict]:
    """{what: changed tensors} of the MTP layer."""
    prefix = f"model.layers.{pair.shape.num_layers}"
    halves = pair.weights[f"{prefix}.eh_proj.weight"].chunk(2, dim=1)
    return {
        "the halves of eh_proj swapped": {f"{prefix}.eh_proj.weight": torch.cat(halves[::-1], dim=1)},
        "one element of eh_proj": pair.changed(f"{prefix}.eh_proj.weight", 1e-2, 0, 0),
        "one element of enorm": pair.changed(f"{prefix}.enorm.weight", 1e-1, 0),
        "one element of hnorm": pair.changed(f"{prefix}.hnorm.weight", 1e-1, 1),
        "one element of the last norm": pair.changed(f"{prefix}.shared_head.norm.weight", 1e-1, 2),
        "one element of its attention": pair.changed(f"{prefix}.self_attn.o_proj.weight", 1e-2, 3, 4),
    }


def test_losses_and_gradients_are_those_of_transformers_own_mtp(pair):
    token_ids = pair.token_ids[:1]
    expected = their_outcome(pair.reference, next_tokens(token_ids), mtp_weight=WEIGHT)
    require_same(ours(pair, token_ids), expected, pair, "with MTP")
    with pytest.raises(AssertionError, match=DIFFERS):
        require_same(ours(pair, token_ids, **changes(pair)["one element of eh_proj"]), expected, pair)


def test_the_loss_tells_each_of_these_changes(pair):
    token_ids = pair.token_ids[:1]
    with torch.no_grad():
        expected = pair.reference.mtp_losses(token_ids).mean().item()
    for what, changed in changes(pair).items():
        apart = abs(mtp_loss(pair.ours(**changed), token_ids) - expected) / expected
        assert apart > TOLERANCES["loss"], f"{what}: {apart:.1e} is within the tolerance"


@pytest.mark.full
@pytest.mark.parametrize("name", grid())
def test_losses_and_gradients_are_those_of_transformers_own_mtp_in_every_combination(name, tmp_path):
    test_losses_and_gradients_are_those_of_transformers_own_mtp(Pair.write(name, grid()[name], tmp_path))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_row_of_2048_tokens_gives_the_same(variant, tmp_path):
    pair = Pair.write(variant, tiny_shape(**VARIANTS[variant], max_position=2048), tmp_path)
    token_ids = random_tokens(pair.shape, batch=1, length=2048, seed=2)
    expected = their_outcome(pair.reference, next_tokens(token_ids), mtp_weight=WEIGHT)
    require_same(ours(pair, token_ids), expected, pair, "2048 tokens with MTP")


class HandWritten:
    """The formula, from transformers' parts: layer N of a model of N + 1 layers is the MTP block."""

    def __init__(self, pair: Pair):
        config = transformers_config(pair.shape, num_hidden_layers=pair.shape.num_layers + 1)
        self.shape: Model = pair.shape
        self.model = Glm4MoeForCausalLM.from_pretrained(
            pair.folder, config=config, dtype=torch.float32, attn_implementation="eager",
        )
        self.prefix = f"model.layers.{pair.shape.num_layers}"
        self.own = {
            name: pair.weights[f"{self.prefix}.{name}"].clone().requires_grad_()
            for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
        }

    def outcome(self, token_ids) -> Outcome:
        *trunk, block = self.model.model.layers
        S, length = token_ids.shape[1], token_ids.shape[1] - 1
        hidden = self.model.model.embed_tokens(token_ids)
        for layer in trunk:
            hidden = layer(hidden, **self._places(hidden, S))
        hidden = self.model.model.norm(hidden)
        main = F.cross_entropy(self.model.lm_head(hidden)[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten(), reduction="sum")

        embedded = self._norm(self.model.model.embed_tokens(token_ids[:, 1:]), "enorm.weight")
        state = torch.cat([embedded, self._norm(hidden[:, :-1], "hnorm.weight")], dim=-1) @ self.own["eh_proj.weight"].T
        state = self._norm(block(state, **self._places(state, length)), "shared_head.norm.weight")
        logits = self.model.lm_head(state)[:, :-1]
        ahead = F.cross_entropy(logits.flatten(0, 1), token_ids[:, 2:].flatten(), reduction="sum")
        (main + WEIGHT * ahead).backward()
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters() if parameter.grad is not None}
        gradients |= {f"{self.prefix}.{name}": tensor.grad for name, tensor in self.own.items()}
        return Outcome(main.item(), stacked_to_files(gradients), ahead.item())

    def _norm(self, tensor, name: str):
        return F.rms_norm(tensor, (self.shape.hidden_size,), self.own[name], self.shape.norm_epsilon)

    def _places(self, hidden, length: int) -> dict:
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        return {"position_embeddings": self.model.model.rotary_emb(hidden, positions), "attention_mask": mask}


def test_losses_and_gradients_are_those_of_the_formula(pair):
    expected = HandWritten(pair).outcome(pair.token_ids)
    require_same(ours(pair, pair.token_ids), expected, pair, "formula")
    with pytest.raises(AssertionError, match=DIFFERS):
        require_same(ours(pair, pair.token_ids, **changes(pair)["the halves of eh_proj swapped"]), expected, pair)
