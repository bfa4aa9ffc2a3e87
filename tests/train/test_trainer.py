"""One optimizer step in this process: groups, gradients of the MTP layer, accumulation, precision."""

import pytest
import torch

from glm import platform

platform.activate("host")
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler  # noqa: E402
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler  # noqa: E402

from glm.model.chunks import named_parameters  # noqa: E402
from glm.optim.param_groups import param_groups  # noqa: E402  (imports below load megatron)
from glm.recipe.schema import TrainRecipe  # noqa: E402
from glm.recipe.sections import AdamWAlone, Muon  # noqa: E402
from glm.rl.batching import policy_batch  # noqa: E402
from glm.rl.loss import policy_loss  # noqa: E402
from glm.rl.types import TrainSample  # noqa: E402
from glm.train.batch import packed_batch  # noqa: E402
from glm.train.losses import next_token_loss  # noqa: E402
from glm.train.step import Trainer  # noqa: E402
from glm.weights import one_rank  # noqa: E402
from tests.model_fixture import tiny_shape  # noqa: E402

SHAPE = tiny_shape()
CPU = torch.device("cpu")


def trainer(**changes) -> Trainer:
    one_rank.start(SHAPE, platform="host")
    return Trainer(TrainRecipe(**{
        "name": "test", "stage": "test", "main": "pretrain.train", "run_folder": "unused", "model": SHAPE, "platform": "host",
        "sequence_length": 32, "rotary_base": 10_000, "batch": {"tokens": 64}, "tokens": 64,
        "schedule": {"peak_lr": 1e-3, "final_lr": 1e-3}, "precision": {"params": "fp32"}, "kernels": {"attention": "sdpa"},
        "data": {"mixture": "unused", "sources": {"prose": {"corpus": "prose", "share": 1.0}}},
    } | changes))


def batch(documents: list[int], seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(SHAPE.vocab_size, (length + 1,), generator=generator) for length in documents]
    return packed_batch([one[:-1] for one in ids], [one[1:] for one in ids], [torch.ones(n) for n in documents], documents, CPU)


def step(one: Trainer, batches, loss=next_token_loss, **changes):
    return one.step(batches, loss, **{"lr": 1e-3, "mtp_weight": 0.3, "bias_update_rate": 1e-3} | changes)


def test_every_parameter_is_in_exactly_one_group():
    one = trainer()
    named = named_parameters(one.chunks)
    groups = param_groups(named, Muon(frozen=("embedding", "router")))
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(name for name, _ in named)
    rules = {name: group.rule for group in groups for name in group.names}
    assert rules["embedding.word_embeddings.weight"] == "frozen"
    assert rules["decoder.layers.1.mlp.router.weight"] == "frozen"
    assert rules["output_layer.weight"] == "adamw"
    assert rules["decoder.layers.0.input_layernorm.weight"] == "adamw"
    assert rules["decoder.layers.1.mlp.experts.weight1"] == "muon"
    assert rules["mtp.layers.0.eh_proj.weight"] == "muon"
    assert f"{sum(p.numel() for _, p in named):,}" in one.optimizer.table


@pytest.mark.parametrize("settings, head, router, matrices", [
    (Muon(), "adamw", "adamw", "muon"), (Muon(head="muon"), "muon", "adamw", "muon"), (Muon(router="muon"), "adamw", "muon", "muon"),
    (AdamWAlone(name="adamw"), "adamw", "adamw", "adamw"),
])
def test_head_and_router_follow_the_rule_the_recipe_names(settings, head, router, matrices):
    groups = param_groups(named_parameters(trainer().chunks), settings)
    rules = {name: (group.rule, group.weight_decay) for group in groups for name in group.names}
    assert rules["output_layer.weight"] == (head, True) and rules["decoder.layers.1.mlp.router.weight"] == (router, True)
    assert rules["mtp.layers.0.transformer_layer.mlp.router.weight"] == (router, True)
    assert rules["decoder.layers.1.mlp.experts.weight1"] == (matrices, True)
    assert rules["embedding.word_embeddings.weight"] == ("adamw", True) and rules["decoder.final_layernorm.weight"] == ("adamw", False)


def test_the_choices_the_report_leaves_open_are_printed_at_the_start():
    table = trainer(optimizer={"head": "muon", "split": {"qkv": "per_head"}}).optimizer.table
    assert "matrices, output head" in table and "embedding, router" in table
    assert "5 Newton-Schulz steps (simple, fp32), momentum 0.95 (Nesterov), update RMS 0.2, qkv per_head, gate and up separate" in table
    assert "Newton-Schulz" not in trainer(optimizer={"name": "adamw"}).optimizer.table


def test_adamw_alone_is_torch_adamw_on_everything():
    one = trainer(optimizer={"name": "adamw", "clip_grad": 0.0})
    named = named_parameters(one.chunks)
    copies = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in named}
    theirs = torch.optim.AdamW([
        {"params": [copy for copy in copies.values() if copy.dim() >= 2], "weight_decay": 0.1},
        {"params": [copy for copy in copies.values() if copy.dim() < 2], "weight_decay": 0.0},
    ], lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for seed in range(3):
        for name, parameter in named:
            parameter.main_grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            copies[name].grad = parameter.main_grad.clone()
        one.optimizer.step(1e-2)
        theirs.step()
    for name, parameter in named:
        torch.testing.assert_close(parameter.detach(), copies[name].detach(), rtol=1e-6, atol=1e-7)


def test_frozen_parameters_keep_their_bytes_and_the_others_move():
    one = trainer(optimizer={"frozen": ["embedding", "output", "router"]})
    before = {name: parameter.clone() for name, parameter in named_parameters(one.chunks)}
    step(one, [batch([20, 12])])
    for name, parameter in named_parameters(one.chunks):
        frozen = name.startswith(("embedding", "output_layer")) or ".router." in name
        assert torch.equal(parameter, before[name]) == frozen, name


def test_two_micro_batches_accumulate_to_the_gradient_of_one():
    """Sums over tokens are divided by the tokens of the whole batch: 20 + 12 tokens apart or together are the same mean."""
    together, apart = trainer(), trainer()
    # the balance loss counts a pack as one sequence and would differ
    for one in (together, apart):
        one.config.moe_aux_loss_coeff = 0.0
    whole = batch([20, 12])
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(SHAPE.vocab_size, (length + 1,), generator=generator) for length in (20, 12)]
    parts = [packed_batch([one[:-1]], [one[1:]], [torch.ones(len(one) - 1)], [len(one) - 1], CPU) for one in ids]
    first, second = step(together, [whole]), step(apart, parts)
    assert first.metrics["loss"] == pytest.approx(second.metrics["loss"], rel=1e-6)
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-5)


def policy_step(one: Trainer, advantage: float, detached: bool):
    one.set_head(mtp_detached=detached, temperature=1.0)
    sample = TrainSample([5, 6, 7, 9, 8, 4], prompt_length=2, rollout_logprobs=[-1.0] * 4, advantage=advantage)
    outcome = step(one, [policy_batch([sample], CPU)], policy_loss(0.2, 0.28), lr=0.0, bias_update_rate=0.0)
    return outcome, {name: p.main_grad.abs().max().item() for name, p in named_parameters(one.chunks)}


def test_a_detached_mtp_loss_reaches_the_mtp_layer_only():
    _, gradients = policy_step(trainer(losses={"sequence_balance_weight": 0.0}), advantage=0.0, detached=True)
    own = {name for name, size in gradients.items() if size > 0}
    assert own and all(name.startswith("mtp.") for name in own)


def test_an_attached_mtp_loss_reaches_trunk_embedding_and_head():
    _, gradients = policy_step(trainer(losses={"sequence_balance_weight": 0.0}), advantage=0.0, detached=False)
    assert all(gradients[name] > 0 for name in ("embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"))


def test_logprobs_are_those_of_the_temperature():
    one = trainer()
    _, plain = policy_step(one, advantage=1.0, detached=True)
    sample = policy_batch([TrainSample([5, 6, 7, 9], 2, [0.0, 0.0], 1.0)], CPU)
    one.chunks[0].eval()
    losses = {}
    for temperature in (1.0, 0.5):
        one.chunks[0].temperature = temperature
        with torch.no_grad():
            losses[temperature] = one.chunks[0](
                input_ids=sample.token_ids, position_ids=sample.position_ids, attention_mask=None, labels=sample.labels,
                packed_seq_params=sample.documents,
            )
    one.chunks[0].temperature = 1.0
    with torch.no_grad():
        logits = one.chunks[0](
            input_ids=sample.token_ids, position_ids=sample.position_ids, attention_mask=None, packed_seq_params=sample.documents,
        )
    expected = torch.nn.functional.cross_entropy(logits[0] / 0.5, sample.labels[0], reduction="none")
    assert torch.allclose(losses[0.5][0], expected, atol=1e-5)
    assert not torch.allclose(losses[1.0], losses[0.5], atol=1e-3)


def test_bf16_parameters_are_stepped_through_fp32_masters():
    """An update smaller than the rounding of bf16 must add up instead of being lost."""
    one = trainer(precision={"params": "bf16"})
    name, parameter = next((n, p) for n, p in named_parameters(one.chunks) if n.endswith("linear_proj.weight"))
    start = parameter.float().clone()
    for seed in range(3):
        step(one, [batch([20, 12], seed)], lr=1e-4)
    master = one.optimizer.masters[parameter]
    assert master.dtype == torch.float32 and not torch.equal(master, start)
    assert torch.equal(parameter, master.to(torch.bfloat16))
    assert all(router.expert_bias.dtype == torch.float32 for _, router in one.routers)


@pytest.mark.parametrize("experts", ["grouped_mm", "host"])
def test_buffers_hold_the_gradient_that_autograd_gives_without_them(experts):
    """Gradients that products add in place, and those that DistributedDataParallel adds, together are the mean over the tokens."""
    one, documents = trainer(kernels={"attention": "sdpa", "experts": experts}), batch([20, 12])
    one.accumulate([documents], next_token_loss, mtp_weight=0.3, bias_update_rate=0.0)
    plain = trainer().chunks[0]
    free = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in plain.named_parameters()}
    plain.mtp_weight = 0.3
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    MTPLossAutoScaler.set_loss_scale(torch.ones(1))
    losses = torch.func.functional_call(plain, free, kwargs={
        "input_ids": documents.token_ids, "position_ids": documents.position_ids, "attention_mask": None, "labels": documents.labels,
        "loss_mask": documents.loss_mask, "packed_seq_params": documents.documents,
    })
    losses.sum().backward()
    for name, parameter in one.chunks[0].named_parameters():
        expected = free[name].grad / 32
        error = (parameter.main_grad - expected).norm() / expected.norm()
        assert error.item() < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("mtp_weight", [0.3, 0.0])
def test_nothing_of_one_step_is_left_in_the_gradients_of_the_next(mtp_weight):
    """Buffers that a step overwrites are not filled with zeros before it, also of experts and of an MTP layer without a token."""
    used, fresh = (trainer(kernels={"attention": "sdpa", "experts": "host"}) for _ in range(2))
    used.accumulate([batch([20, 12], seed=1), batch([9], seed=2)], next_token_loss, mtp_weight=0.3, bias_update_rate=0.0)
    few = [batch([2], seed=3), batch([3], seed=4)]
    for one in (used, fresh):
        for parameter in one.optimizer.params:
            parameter.main_grad.add_(1.0)
        one.accumulate(few, next_token_loss, mtp_weight=mtp_weight, bias_update_rate=0.0)
    gradients = {name: parameter.main_grad for name, parameter in named_parameters(used.chunks)}
    for name, parameter in named_parameters(fresh.chunks):
        assert torch.equal(gradients[name], parameter.main_grad), name
        assert gradients[name].abs().max() < 1, name
    assert any(getattr(parameter, "owns_buffer", False) for parameter in used.optimizer.params)
    if mtp_weight == 0.0:
        assert not gradients["mtp.layers.0.eh_proj.weight"].any()
