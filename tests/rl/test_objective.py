"""Advantages, objective and batching against values derived by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm import platform
from glm.rl.advantage import group_advantages
from glm.rl.types import TrainSample

platform.activate("host")
from glm.rl.batching import deal, policy_batch  # noqa: E402  (imports megatron)
from glm.rl.loss import clipped_objective, policy_loss  # noqa: E402


def test_advantages_have_mean_zero_and_unit_deviation():
    # rewards 1 0 0 0: mean 1/4, population deviation sqrt(3)/4, so (3/4) / (sqrt(3)/4) = sqrt(3) and -1/sqrt(3)
    found = group_advantages([1.0, 0.0, 0.0, 0.0], normalize_std=True)
    assert found == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3], rel=1e-4)
    assert group_advantages([1.0, 0.0, 0.0, 0.0], normalize_std=False) == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_a_group_without_difference_teaches_nothing():
    assert group_advantages([1.0] * 8, normalize_std=True) == [0.0] * 8


def test_gradient_on_policy_is_that_of_reinforce():
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantages = torch.tensor([1.5, -0.5, 0.0])
    clipped_objective(logprobs, logprobs.detach(), advantages, clip_low=0.2, clip_high=0.28).sum().backward()
    assert torch.allclose(logprobs.grad, -advantages)


@pytest.mark.parametrize("ratio, advantage, moves", [
    (1.3, 1.0, False), (1.2, 1.0, True), (0.7, -1.0, False), (0.9, -1.0, True), (1.3, -1.0, True), (0.7, 1.0, True),
])
def test_clipping_stops_only_moves_further_away(ratio, advantage, moves):
    logprob = torch.tensor(math.log(ratio), requires_grad=True)
    clipped_objective(logprob, torch.tensor(0.0), torch.tensor(advantage), clip_low=0.2, clip_high=0.28).backward()
    assert (logprob.grad.abs() > 0).item() == moves


def test_policy_batch_puts_logprobs_where_the_tokens_are_predicted():
    sample = TrainSample([5, 6, 7, 9, 8], prompt_length=3, rollout_logprobs=[-0.1, -0.2], advantage=2.0)
    batch = policy_batch([sample, sample], torch.device("cpu"))
    assert batch.token_ids.tolist() == [[5, 6, 7, 9] * 2]
    assert batch.labels.tolist() == [[6, 7, 9, 8] * 2]
    assert batch.loss_mask.tolist() == [[0, 0, 1, 1] * 2]
    assert batch.extra["advantages"].tolist() == [[0, 0, 2, 2] * 2]
    assert torch.allclose(batch.extra["rollout_logprobs"][0, :4], torch.tensor([0, 0, -0.1, -0.2]))
    assert batch.position_ids.tolist() == [[0, 1, 2, 3] * 2]


def test_the_loss_reports_the_difference_between_trainer_and_rollout():
    sample = TrainSample([5, 6, 7, 9], prompt_length=2, rollout_logprobs=[-1.0, -2.0], advantage=1.0)
    batch = policy_batch([sample], torch.device("cpu"))
    losses = torch.tensor([[9.0, 1.1, 2.3]])  # -logprob of each label; the first is of the prompt
    objective, count, metrics = policy_loss(0.2, 0.28)(losses, batch)
    assert count.item() == 2
    # logprobs -1.1 and -2.3 against -1.0 and -2.0, advantage 1: -(e^-0.1 + max(e^-0.3, ...)), the second unclipped below
    assert objective.item() == pytest.approx(-(math.exp(-0.1) + math.exp(-0.3)), rel=1e-5)
    total, tokens = metrics["logprob_difference"]
    assert (total / tokens).item() == pytest.approx(0.2, rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(3, 60), min_size=1, max_size=40), ranks=st.integers(1, 4), limit=st.integers(64, 256))
def test_dealing_loses_no_sample_and_gives_every_rank_as_many_batches(lengths, ranks, limit):
    samples = [TrainSample(list(range(length)), 2, [0.0] * (length - 2), float(i + 1)) for i, length in enumerate(lengths)]
    dealt = deal(samples, ranks, limit)
    assert len({len(mine) for mine in dealt}) == 1
    assert all(batch for mine in dealt for batch in mine)
    assert all(len(batch) == 1 or sum(len(sample.token_ids) for sample in batch) <= limit for mine in dealt for batch in mine)
    real = [sample.advantage for mine in dealt for batch in mine for sample in batch if sample.rollout_logprobs]
    assert sorted(real) == sorted(sample.advantage for sample in samples)
