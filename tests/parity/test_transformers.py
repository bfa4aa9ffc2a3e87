"""Our network against transformers' Glm4MoeForCausalLM: the same weights give the same logits, losses and gradients.

Every comparison has twins with one weight changed, and must tell them apart. Shapes: tests/parity/shapes.py; tolerances and
what they are measured in: tests/parity/compare.py.
"""

import pytest
import torch

from glm.convert.verify import logits
from glm.train.batch import packed_batch
from tests.model_fixture import random_tokens, tiny_shape
from tests.parity.compare import (
    TOLERANCES, Pair, difference, next_tokens, our_outcome, require, require_same, their_outcome,
)
from tests.parity.shapes import QUICK, VARIANTS, grid

DIFFERS = "differs by|0 on one side"


@pytest.fixture(scope="module", params=QUICK)
def pair(request, tmp_path_factory) -> Pair:
    return Pair.write(request.param, QUICK[request.param], tmp_path_factory.mktemp("model"))


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@torch.no_grad()
def test_logits_are_those_of_transformers(pair):
    require(logits={pair.name: difference(logits(pair.ours(), pair.token_ids), pair.reference_logits)})


def changes(pair: Pair) -> dict[str, dict]:
    """{what: changed tensors}, most of them of the last layer; the changed expert is one that some token chose."""
    shape, layer = pair.shape, f"model.layers.{pair.shape.num_layers - 1}"
    found = {
        "one element of one expert": pair.changed(f"{layer}.mlp.experts.{pair.busy_expert}.gate_proj.weight", 1e-2, 0, 0),
        "one key bias": pair.changed(f"{layer}.self_attn.k_proj.bias", 1e-2, 0),
        "one query bias": pair.changed(f"{layer}.self_attn.q_proj.bias", 1e-2, 1),
        "one value weight": pair.changed(f"{layer}.self_attn.v_proj.weight", 1e-2, 1, 2),
        "one element of a norm": pair.changed(f"{layer}.post_attention_layernorm.weight", 1e-2, 3),
        "one element of the head": pair.changed("lm_head.weight", 1e-2, 4, 5),
    }
    if shape.experts_per_token > 1:  # the weight of a token's only expert does not depend on its score
        found["one row of the router"] = pair.changed(f"{layer}.mlp.gate.weight", 1e-2, pair.busy_expert)
    if shape.experts_per_token < shape.num_experts:  # the bias chooses among experts, and weighs nothing
        found["the router bias of one expert"] = pair.changed(f"{layer}.mlp.gate.e_score_correction_bias", -2.0, pair.busy_expert)
    if shape.num_shared_experts:
        found["one element of the shared expert"] = pair.changed(f"{layer}.mlp.shared_experts.down_proj.weight", 1e-2, 1, 1)
    if shape.qk_norm:
        found["one element of a head norm"] = pair.changed(f"{layer}.self_attn.q_norm.weight", 1e-1, 0)
    if shape.num_dense_layers:
        found["one element of a dense layer"] = pair.changed("model.layers.0.mlp.up_proj.weight", 1e-2, 0, 1)
    return found


@torch.no_grad()
def test_logits_tell_each_of_these_changes_of_one_weight(pair):
    for what, changed in changes(pair).items():
        apart = difference(logits(pair.ours(**changed), pair.token_ids), pair.reference_logits)
        assert apart > TOLERANCES["logits"], f"{what}: {apart:.1e} is within the tolerance"


@torch.no_grad()
def test_logits_tell_another_rotary_base(pair):
    apart = difference(logits(pair.ours(rotary_base=20_000), pair.token_ids), pair.reference_logits)
    assert apart > TOLERANCES["logits"]


def require_parity(pair: Pair, token_ids, what: str = "") -> None:
    """Losses and gradients of transformers on ``token_ids``; and not those of a model with one other weight."""
    batch = next_tokens(token_ids)
    expected = their_outcome(pair.reference, batch)
    require_same(our_outcome(pair.ours(), pair.shape, batch), expected, pair, what)
    twin = pair.ours(**changes(pair)["one element of one expert"])
    with pytest.raises(AssertionError, match=DIFFERS):
        require_same(our_outcome(twin, pair.shape, batch), expected, pair, what)


def test_loss_and_gradients_are_those_of_transformers(pair):
    require_parity(pair, pair.token_ids)


@pytest.mark.full
@pytest.mark.parametrize("name", grid())
def test_loss_and_gradients_are_those_of_transformers_in_every_combination(name, tmp_path):
    pair = Pair.write(name, grid()[name], tmp_path)
    with torch.no_grad():
        require(logits={name: difference(logits(pair.ours(), pair.token_ids), pair.reference_logits)})
    require_parity(pair, pair.token_ids)


def test_one_row_of_2048_tokens_gives_the_same(variant, tmp_path):
    pair = Pair.write(variant, tiny_shape(**VARIANTS[variant], max_position=2048), tmp_path)
    require_parity(pair, random_tokens(pair.shape, batch=1, length=2048, seed=2), "2048 tokens")


@pytest.mark.parametrize("batch", [1, 5])
def test_rows_of_one_token_give_the_same(variant, batch, tmp_path):
    pair = Pair.write(variant, tiny_shape(**VARIANTS[variant]), tmp_path)
    token_ids = random_tokens(pair.shape, batch, length=1)
    rows = token_ids, token_ids.flip(0) + 1, torch.ones(token_ids.shape)
    expected = their_outcome(pair.reference, rows)
    ours = our_outcome(pair.ours(), pair.shape, rows)
    # the softmax of one score is 1 whatever the score
    require_same(ours, expected, pair, f"{batch} rows of one token", rounding_only=("q_proj", "k_proj", "q_norm", "k_norm"))
    with pytest.raises(AssertionError, match=DIFFERS):
        twin = pair.ours(**pair.changed("model.layers.3.self_attn.v_proj.bias", 1e-2, 0))
        require_same(our_outcome(twin, pair.shape, rows), expected, pair)


def test_experts_without_a_token_have_no_gradient_on_either_side(variant, tmp_path):
    shape = tiny_shape(**VARIANTS[variant])
    idle = {1, 4, 7}
    bias = torch.zeros(shape.num_experts)
    bias[list(idle)] = -10.0  # below any sigmoid
    names = [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in range(1, shape.num_layers + 1)]
    pair = Pair.write(variant, shape, tmp_path, **{name: bias.clone() for name in names})
    rows = next_tokens(random_tokens(shape, batch=8))  # enough for every other expert
    expected = their_outcome(pair.reference, rows, mtp_weight=0.3)
    ours = our_outcome(pair.ours(), shape, rows, mtp_weight=0.3)
    require_same(ours, expected, pair, "idle experts")
    parts = ("gate_proj", "up_proj", "down_proj")
    assert ours.unused == {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
        for layer in range(1, shape.num_layers + 1) for expert in idle for part in parts
    }
    for name in (names[0], names[-1]):  # the twin: in one layer, of the trunk or the MTP layer, they get tokens
        twin = pair.ours(**{name: torch.zeros(shape.num_experts)})
        with pytest.raises(AssertionError, match="0 on one side"):
            require_same(our_outcome(twin, shape, rows, mtp_weight=0.3), expected, pair)


def test_a_pack_of_documents_gives_what_each_gives_alone(variant, tmp_path):
    """Main and MTP losses; documents of one and two tokens have no MTP target."""
    pair = Pair.write(variant, tiny_shape(**VARIANTS[variant]), tmp_path)
    lengths = [20, 1, 7, 2, 37, 1, 63]
    documents = random_tokens(pair.shape, 1, sum(lengths), seed=3).split(lengths, dim=1)
    alone = [next_tokens(document) for document in documents]
    expected = their_outcome(pair.reference, *alone, mtp_weight=0.3)

    def packed(model, lengths):
        columns = ([row[0] for row in column] for column in zip(*alone))
        return our_outcome(model, pair.shape, packed_batch(*columns, lengths, torch.device("cpu")), mtp_weight=0.3)

    require_same(packed(pair.ours(), lengths), expected, pair, "packed")
    for what, twin, bounds in (
        ("a boundary is one token off", pair.ours(), [21, 1, 6, 2, 37, 1, 63]),
        ("one weight", pair.ours(**pair.changed("model.layers.0.self_attn.v_proj.weight", 1e-2, 0, 0)), lengths),
    ):
        with pytest.raises(AssertionError, match=DIFFERS):
            require_same(packed(twin, bounds), expected, pair)
            pytest.fail(f"{what}: within the tolerance")
