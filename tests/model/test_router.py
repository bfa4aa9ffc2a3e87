"""The router against float64: which experts, with what weights, and how the bias moves.

What float32 can blur. With u = 2^-24, a token x of n numbers and an expert's row w, the logit carries at most n u sum|x_i w_i|
(every order of summing). The sigmoid's slope is at most 1/4, and torch's has 2 ulp of its own: a score s in (0, 1) carries
|logit error| / 4 + 4 u. Adding the bias b rounds once more, by u |s + b|. The choice must be float64's wherever the k-th and the
(k+1)-th score + bias are further apart than the sum of both errors; nearer ones may fall either way, but the same way every time.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from glm.model.router import SigmoidRouter
from tests.model_fixture import megatron_model, tiny_shape

U = 2.0**-24
HIDDEN, EXPERTS, CHOSEN, SCALE = 64, 32, 8, 2.5


@pytest.fixture(scope="module")
def router() -> SigmoidRouter:
    shape = tiny_shape(num_experts=EXPERTS, experts_per_token=CHOSEN, routed_scaling_factor=SCALE, num_layers=2, num_mtp_layers=0)
    found = [module for module in megatron_model(shape).modules() if isinstance(module, SigmoidRouter)]
    return found[0].eval()


@torch.no_grad()
def route(router, hidden_TH: torch.Tensor, weight_EH: torch.Tensor, bias_E: torch.Tensor):
    """(weights [T, E], choice [T, E]) of the suite's router."""
    router.weight.copy_(weight_EH)
    router.expert_bias = bias_E.clone()
    return router(hidden_TH[:, None])


def reference(hidden_TH, weight_EH, bias_E, chosen: int = CHOSEN, scale: float = SCALE):
    """In float64, from the same float32 numbers: (weights [T, E], choice [T, E], decided [T]), the last where the gap between
    the last chosen and the first not chosen is more than float32 can blur."""
    x, w, b = (tensor.numpy().astype(np.float64) for tensor in (hidden_TH, weight_EH, bias_E))
    scores = 1 / (1 + np.exp(-x @ w.T))
    ranked = scores + b
    order = np.argsort(-ranked, axis=1, kind="stable")
    choice = np.zeros_like(scores, dtype=bool)
    np.put_along_axis(choice, order[:, :chosen], True, axis=1)
    kept = np.where(choice, scores, 0)
    error = x.shape[1] * U * (np.abs(x) @ np.abs(w.T)) / 4 + 4 * U + U * np.abs(ranked)
    last, first_out = order[:, chosen - 1, None], order[:, chosen, None]
    gap, blur = (np.take_along_axis(a, last, 1) - sign * np.take_along_axis(a, first_out, 1)
                 for a, sign in ((ranked, 1), (error, -1)))
    weights = kept / kept.sum(1, keepdims=True) * scale
    return torch.from_numpy(weights), torch.from_numpy(choice), torch.from_numpy((gap > blur)[:, 0])


def draw(seed: int, tokens: int = 512, offset: float = 0.0, spread: float = 0.05, size: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator) * size
    weight = torch.randn(EXPERTS, HIDDEN, generator=generator) / HIDDEN**0.5
    return hidden, weight, offset + spread * torch.randn(EXPERTS, generator=generator)


OFFSETS = {"no offset": 0.0, "as in released GLM models": 7.0, "far": 250.0, "in the thousands": 4000.0}


@pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_choice_is_that_of_float64_wherever_the_gap_exceeds_rounding(router, offset, seed):
    hidden, weight, bias = draw(seed, offset=offset)
    probs, choice = route(router, hidden, weight, bias)
    expected_probs, expected, decided = reference(hidden, weight, bias)
    assert choice.sum(1).eq(CHOSEN).all()
    assert decided.double().mean() > (0.98 if offset < 1000 else 0.5), "the bound decides too few tokens to mean anything"
    assert torch.equal(choice[decided], expected[decided])
    same = (choice == expected).all(1)
    error = ((probs - expected_probs).abs()[same] / expected_probs[same].clamp(min=1e-3)).max()
    assert error <= 1e-6, f"weights differ by {error:.1e}"


@pytest.mark.parametrize(("offset", "share"), [(7.0, 0.1), (250.0, 0.5)])
def test_a_bias_in_bfloat16_chooses_others(router, offset, share):
    """The twin: bfloat16 has 8 bits, so near 7 it knows steps of 1/32 only, and near 250 steps of 1."""
    hidden, weight, bias = draw(0, offset=offset)
    _, expected, decided = reference(hidden, weight, bias)
    _, choice = route(router, hidden, weight, bias.bfloat16().float())
    assert (choice != expected).any(1)[decided].double().mean() > share


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("offset", [0.0, 7.0, 4000.0])
def test_an_expert_a_few_ulp_ahead_gets_the_last_place(router, offset, steps):
    """Two experts with the same logits, whose biases are ``steps`` ulp apart, compete for the last place. Adding the score
    rounds both sums; rounding keeps their order, and sums more than an ulp apart stay apart (one ulp is not enough: halves go
    to the even neighbour, so 1.5 and 2.5 ulp both become 2)."""
    hidden, weight, _ = draw(3, tokens=256, size=20.0)
    weight[:, 1:] = 0  # one product a logit: sums of many would round by the order that the place of the expert gives them
    weight[[5, 21], 0] = 0.1
    bias = torch.full((EXPERTS,), offset - 5)
    bias[-(CHOSEN - 1):] = offset + 5
    behind = torch.tensor(offset + 0.3)
    ahead = behind.clone()
    for _ in range(steps):
        ahead = ahead.nextafter(torch.tensor(torch.inf))
    sums = torch.sigmoid(hidden @ weight[5]) + ahead
    decided = ahead - behind > sums.nextafter(torch.tensor(torch.inf)) - sums
    assert decided.any() == (steps > 1)
    for first, second in ((5, 21), (21, 5)):
        bias[first], bias[second] = ahead, behind
        _, choice = route(router, hidden, weight, bias)
        assert (choice[:, first] != choice[:, second]).all()
        assert choice[decided, first].all()


@pytest.mark.parametrize(
    "case", ["equal logits", "scores of exactly 1", "scores of exactly 0", "a bias that swallows every score"],
)
def test_ties_fall_the_same_way_in_every_batch(router, case):
    """Whatever torch.topk picks among equal numbers, it picks row by row: the same token alone, in another place or beside
    others gets the same experts. Which they are is torch's affair: on a CPU not the lowest numbers."""
    hidden, weight, bias = draw(4, tokens=64)
    if case == "equal logits":
        weight[:] = weight[0]
        bias[:] = 7.0
    elif case.startswith("scores"):  # in float32 the sigmoid is 1 above 17, and 0 below -104
        weight[:] = 0
        weight[:, 0] = torch.linspace(1, 2, EXPERTS)
        hidden[:] = 0
        hidden[:, 0] = 20 if case.endswith("1") else -110
        bias[:] = 0
    else:
        bias[:] = 2.0**25
    probs, choice = route(router, hidden, weight, bias)
    assert choice.sum(1).eq(CHOSEN).all() and probs.isfinite().all()
    order = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(0))
    assert torch.equal(route(router, hidden[order], weight, bias)[1], choice[order])
    assert torch.equal(torch.cat([route(router, part, weight, bias)[1] for part in hidden.split(1)]), choice)
    assert torch.equal(torch.cat([route(router, part, weight, bias)[1] for part in hidden.split(13)]), choice)


def test_saturated_scores_still_weigh_as_float64_says(router):
    """Logits to +-60: scores of 1 tie and are left to the bias; scores of 1e-26 are weighed, not lost."""
    hidden, weight, bias = draw(5, size=20.0, spread=0.5)
    probs, choice = route(router, hidden, weight, bias)
    expected_probs, expected, decided = reference(hidden, weight, bias)
    assert torch.equal(choice[decided], expected[decided]) and decided.double().mean() > 0.5
    same = (choice == expected).all(1)
    # the logit of 60 carries 64 u 60 of rounding, and a score far below 1 as much relatively
    assert torch.allclose(probs[same].double(), expected_probs[same], rtol=2e-5, atol=1e-6)


def test_one_expert_a_token_weighs_the_scaling_factor():
    """As transformers and SGLang have it: the score divided by itself."""
    shape = tiny_shape(num_experts=4, experts_per_token=1, num_layers=2, num_mtp_layers=0)
    alone = next(module for module in megatron_model(shape).modules() if isinstance(module, SigmoidRouter))
    probs, choice = alone(torch.randn(16, 1, HIDDEN))
    assert torch.equal(probs, choice * 2.5)


@pytest.fixture
def model_in_bfloat16():
    """Wrapped as the trainer wraps it: Float16Module casts every parameter and buffer."""
    shape = tiny_shape(num_layers=2)
    model = megatron_model(shape, params="bf16")
    for router in model.modules():
        if isinstance(router, SigmoidRouter):
            router.expert_bias.copy_(torch.linspace(6.8, 7.1, shape.num_experts))
    return Float16Module(model.config, model).train()


def routers_of(model) -> list[SigmoidRouter]:
    return [module for module in model.modules() if isinstance(module, SigmoidRouter)]


def test_bias_and_counts_stay_exact_in_a_bfloat16_model(model_in_bfloat16):
    """bfloat16 counts to 256; float32 to 2^24, more tokens than one expert gets in a batch of 64 million."""
    for router in routers_of(model_in_bfloat16):
        assert torch.equal(router.expert_bias, torch.linspace(6.8, 7.1, 8))
        expected = torch.zeros(8, dtype=torch.int64)
        for _ in range(3):
            hidden = torch.randn(1001, 1, HIDDEN).bfloat16()
            expected += router(hidden)[1].sum(0)
            with torch.no_grad():
                router(hidden)  # evaluation and recomputation do not count
        assert expected.max() > 256 and expected.unique().numel() > 3
        assert router.local_tokens_per_expert.tolist() == expected.tolist()
        assert router.local_tokens_per_expert.bfloat16().tolist() != expected.tolist()  # the twin


def test_padding_is_not_counted(model_in_bfloat16):
    for router in routers_of(model_in_bfloat16):
        hidden = torch.randn(64, 2, HIDDEN).bfloat16()
        padding = torch.zeros(64, 2, dtype=torch.bool)
        padding[40:, 1] = True
        choice = router(hidden, padding_mask=padding)[1]
        assert torch.equal(router.local_tokens_per_expert, choice[~padding.flatten()].sum(0).float())


def test_bias_moves_one_step_towards_the_mean_load(model_in_bfloat16):
    """bias += rate * sign(mean - load), in float32: a step of 0.001 at 7 is 2097 ulp of float32, and nothing in bfloat16."""
    loads = [[300, 299, 301, 300, 4000, 0, 300, 300], [257, 257, 257, 257, 257, 257, 257, 257]]
    rate, config, routers = 1e-3, model_in_bfloat16.config, routers_of(model_in_bfloat16)
    config.moe_router_bias_update_rate = rate
    parallel = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model_in_bfloat16)
    before = [router.expert_bias.clone() for router in routers]
    for router, load in zip(routers, loads, strict=True):
        router.local_tokens_per_expert.copy_(torch.tensor(load))
    finalize_model_grads([parallel])
    for router, load, bias in zip(routers, loads, before):
        mean = sum(load) / len(load)
        expected = bias + torch.tensor([rate * ((tokens < mean) - (tokens > mean)) for tokens in load])
        assert torch.equal(router.expert_bias, expected)
        assert torch.equal(router.expert_bias, bias) == (len(set(load)) == 1)
        assert torch.equal(expected.bfloat16(), bias.bfloat16())  # the twin: a bias in bfloat16 would never move
        assert not router.local_tokens_per_expert.any()  # the next batch counts from 0


@pytest.mark.parametrize("chosen", [1, 3])
def test_the_sequence_balance_loss_is_that_of_the_report(chosen):
    """weight * sum_i f_i P_i of each row, the mean over rows (DeepSeek-V3, arXiv 2412.19437 eq. 17-20, which the report takes
    over): f_i the experts' share of the choices by score alone, times E / K; P_i the mean of the scores over their sum.

    The trainer divides every gradient by the tokens of the batch, so the router multiplies by them.
    """
    weight, S, B, E = 0.01, 20, 3, 8
    shape = tiny_shape(num_experts=E, experts_per_token=chosen, num_layers=2, num_mtp_layers=0)
    router = routers_of(megatron_model(shape))[0].train()
    router.config.moe_aux_loss_coeff = weight
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # of the process: a Trainer before us leaves 1 / its tokens
    hidden = torch.randn(S, B, HIDDEN, generator=torch.Generator().manual_seed(1))
    probs, _ = router(hidden)
    (probs * 0).sum().backward()

    own = router.weight.detach().double().requires_grad_()
    scores_SBE = torch.sigmoid(hidden.double() @ own.T)
    f_BE = torch.zeros_like(scores_SBE).scatter(-1, scores_SBE.topk(chosen).indices, 1.0).sum(0) * E / (chosen * S)
    p_BE = (scores_SBE / scores_SBE.sum(-1, keepdim=True)).mean(0)
    (weight * (f_BE * p_BE).sum(-1).mean() * S * B).backward()
    assert torch.allclose(router.weight.grad.double(), own.grad, rtol=1e-4, atol=1e-6 * own.grad.abs().max().item())
    assert own.grad.abs().max() > 0
