"""Our network against transformers' Glm4MoeForCausalLM: the same weights give the same logits, losses and gradients.

Each comparison has twins with one weight changed, and must tell them apart.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import Glm4MoeForCausalLM

from glm.convert.reference import Reference
from glm.convert.verify import logits, mtp_loss
from glm.weights.name_map import rows
from tests.model_fixture import SHAPES, megatron_model, random_hf_weights, random_tokens, transformers_config, write_hf_folder

LOGITS = 1e-5
"""Largest absolute difference; logits are of order 1."""
GRADIENT = 2e-5
"""Largest norm of the difference over the norm, of each tensor."""
MTP_WEIGHT = 0.3


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    """(shape, weights, folder) of one variant."""
    shape = SHAPES[request.param]
    weights = random_hf_weights(shape)
    return shape, weights, write_hf_folder(tmp_path_factory.mktemp(request.param), shape, weights)


def require_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = LOGITS) -> None:
    difference = (ours - theirs).abs().max().item()
    assert difference <= tolerance, f"differ by {difference:.2e}"


def require_same_gradients(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:5]
    unused = 0
    for name, gradient in theirs.items():
        unused += not gradient.any()
        error = ((ours[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)).item()
        assert error <= GRADIENT, f"{name}: {error:.2e}"
    assert unused < len(theirs) / 8, f"{unused} of {len(theirs)} tensors have no gradient: too few experts are used"


@torch.no_grad()
def test_logits_are_those_of_transformers(pair):
    shape, weights, folder = pair
    token_ids = random_tokens(shape)
    expected = Reference(folder).logits(token_ids)
    assert 0.3 < expected.std() < 5, "logits of order 1, or the tolerance means nothing"
    require_close(logits(megatron_model(shape, weights), token_ids), expected)


def plus(amount: float, *index: int):
    def change(tensor):
        tensor[index] += amount
    return change


TWINS = {
    "one element of one expert": ("model.layers.3.mlp.experts.{busy}.gate_proj.weight", plus(1e-2, 0, 0)),
    "one element of the shared expert": ("model.layers.3.mlp.shared_experts.down_proj.weight", plus(1e-2, 1, 1)),
    "the router bias of one expert": ("model.layers.3.mlp.gate.e_score_correction_bias", plus(0.5, 2)),
    "one row of the router": ("model.layers.3.mlp.gate.weight", plus(1e-2, 2)),
    "one key bias": ("model.layers.1.self_attn.k_proj.bias", plus(1e-2, 0)),
    "one query bias": ("model.layers.1.self_attn.q_proj.bias", plus(1e-2, 1)),
    "one element of a norm": ("model.layers.2.post_attention_layernorm.weight", plus(1e-2, 3)),
}


def busy_expert(weights) -> str:
    """The expert of layer 3 with the largest bias: some tokens choose it."""
    return str(weights["model.layers.3.mlp.gate.e_score_correction_bias"].argmax().item())


@pytest.mark.parametrize("what", TWINS)
@torch.no_grad()
def test_logits_tell_a_changed_weight(pair, what):
    shape, weights, folder = pair
    token_ids = random_tokens(shape)
    expected = Reference(folder).logits(token_ids)
    name, change = TWINS[what]
    name = name.replace("{busy}", busy_expert(weights))
    twin = weights | {name: weights[name].clone()}
    change(twin[name])
    with pytest.raises(AssertionError, match="differ by"):
        require_close(logits(megatron_model(shape, twin), token_ids), expected)


@torch.no_grad()
def test_logits_tell_another_rotary_base(pair):
    shape, weights, folder = pair
    token_ids = random_tokens(shape)
    with pytest.raises(AssertionError, match="differ by"):
        require_close(logits(megatron_model(shape, weights, rotary_base=20_000), token_ids), Reference(folder).logits(token_ids))


def our_gradients(shape, weights, token_ids, mtp_weight: float) -> tuple[float, float, dict]:
    """(mean loss, mean MTP loss, gradient of the summed losses under Hugging Face names)."""
    model = megatron_model(shape, weights)
    model.mtp_weight = mtp_weight
    S = token_ids.shape[1]
    labels, mask = token_ids.roll(-1, 1), torch.ones(token_ids.shape)
    mask[:, -1] = 0
    losses = model(input_ids=token_ids, position_ids=torch.arange(S).expand(token_ids.shape), attention_mask=None,
                   labels=labels, loss_mask=mask)
    total = (losses * mask).sum()
    total.backward()
    parameters = dict(model.named_parameters())
    gradients = {}
    for row in rows(shape):
        if not row.is_router_bias:
            gradient = parameters[row.megatron].grad
            if gradient is not None:
                gradients |= zip(row.names(range(shape.num_experts)), row.transform.to_hf(gradient, shape))
    mtp_total, mtp_count = model.take_mtp_loss().tolist()
    return (total / mask.sum()).item(), mtp_total / max(mtp_count, 1), gradients


def their_gradients(model: torch.nn.Module) -> dict:
    """Gradients under the names of the files: transformers stacks the experts in memory."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        prefix = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(parameter.grad):
                gate, up = both.chunk(2)
                gradients |= {f"{prefix}.{expert}.gate_proj.weight": gate, f"{prefix}.{expert}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            gradients |= {f"{prefix}.{expert}.down_proj.weight": down for expert, down in enumerate(parameter.grad)}
        else:
            gradients[name] = parameter.grad
    return gradients


def test_loss_and_gradients_are_those_of_transformers(pair):
    shape, weights, folder = pair
    token_ids = random_tokens(shape)
    reference = Glm4MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = F.cross_entropy(reference(input_ids=token_ids).logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten(), reduction="none")
    out.sum().backward()
    loss, _, gradients = our_gradients(shape, weights, token_ids, mtp_weight=0.0)
    assert abs(loss - out.mean().item()) < 1e-5
    require_same_gradients(gradients, their_gradients(reference))
    name = f"model.layers.3.mlp.experts.{busy_expert(weights)}.up_proj.weight"
    twin = weights | {name: weights[name].clone()}
    twin[name][0, 0] += 1e-2
    with pytest.raises(AssertionError):
        require_same_gradients(our_gradients(shape, twin, token_ids, mtp_weight=0.0)[2], their_gradients(reference))


class HandWrittenMTP:
    """The MTP loss as the report describes it, from transformers' parts: layer N of a model of N + 1 layers is the MTP block."""

    def __init__(self, shape, weights, folder):
        config = transformers_config(shape, num_hidden_layers=shape.num_layers + 1)
        self.model = Glm4MoeForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="eager")
        prefix = f"model.layers.{shape.num_layers}"
        self.own = {
            name: weights[f"{prefix}.{name}"].clone().requires_grad_()
            for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
        }
        self.prefix, self.shape = prefix, shape

    def losses(self, token_ids):
        """(next-token losses, MTP losses), both summed."""
        *trunk, block = self.model.model.layers
        S, length = token_ids.shape[1], token_ids.shape[1] - 1
        hidden = self.model.model.embed_tokens(token_ids)
        for layer in trunk:
            hidden = layer(hidden, **self._places(hidden, S))
        hidden = self.model.model.norm(hidden)
        main = F.cross_entropy(self.model.lm_head(hidden)[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten(), reduction="sum")

        norm = lambda tensor, name: F.rms_norm(tensor, (self.shape.hidden_size,), self.own[name], self.shape.norm_epsilon)  # noqa: E731
        embedded = norm(self.model.model.embed_tokens(token_ids[:, 1:]), "enorm.weight")
        state = torch.cat([embedded, norm(hidden[:, :-1], "hnorm.weight")], dim=-1) @ self.own["eh_proj.weight"].T
        state = norm(block(state, **self._places(state, length)), "shared_head.norm.weight")
        ahead = self.model.lm_head(state)[:, :-1]
        return main, F.cross_entropy(ahead.flatten(0, 1), token_ids[:, 2:].flatten(), reduction="sum")

    def _places(self, hidden, length):
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        return {"position_embeddings": self.model.model.rotary_emb(hidden, positions), "attention_mask": mask}

    def gradients(self) -> dict:
        return their_gradients(self.model) | {f"{self.prefix}.{name}": tensor.grad for name, tensor in self.own.items()}


def test_mtp_loss_and_gradients_are_those_of_the_formula(pair):
    shape, weights, folder = pair
    token_ids = random_tokens(shape)
    written = HandWrittenMTP(shape, weights, folder)
    main, ahead = written.losses(token_ids)
    (main + MTP_WEIGHT * ahead).backward()
    _, mtp, gradients = our_gradients(shape, weights, token_ids, mtp_weight=MTP_WEIGHT)
    assert abs(mtp - ahead.item() / token_ids[:, 2:].numel()) < 1e-5
    require_same_gradients(gradients, written.gradients())


@torch.no_grad()
def test_mtp_loss_is_that_of_transformers_own_mtp(pair):
    shape, weights, folder = pair
    token_ids = random_tokens(shape, batch=1)
    expected = Reference(folder).mtp_losses(token_ids).mean().item()
    assert abs(mtp_loss(megatron_model(shape, weights), token_ids) - expected) < 1e-5
    prefix = f"model.layers.{shape.num_layers}"
    for name in (f"{prefix}.mlp.gate.e_score_correction_bias", f"{prefix}.shared_head.norm.weight", f"{prefix}.hnorm.weight"):
        twin = weights | {name: weights[name].clone()}
        twin[name][0] += 0.5
        assert abs(mtp_loss(megatron_model(shape, twin), token_ids) - expected) > 1e-5, name
    halves = weights[f"{prefix}.eh_proj.weight"].chunk(2, dim=1)
    swapped = weights | {f"{prefix}.eh_proj.weight": torch.cat(halves[::-1], dim=1)}
    assert abs(mtp_loss(megatron_model(shape, swapped), token_ids) - expected) > 1e-3
