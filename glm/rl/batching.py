"""Training samples as micro-batches: every rank the same number of them, all of similar length."""

import torch

from glm.train.batch import MicroBatch, packed_batch
from glm.rl.types import TrainSample


def deal(samples: list[TrainSample], ranks: int, tokens_per_batch: int) -> list[list[list[TrainSample]]]:
    """[rank][micro-batch][sample]: longest first, each to the rank with the fewest tokens, then to its emptiest batch.

    Every rank gets the same number of non-empty batches (expert dispatch is collective); a rank with too few samples
    repeats one whose advantage and loss mask count for nothing.
    """
    order = sorted(range(len(samples)), key=lambda index: (-len(samples[index].token_ids), index))
    dealt = _lightest(order, samples, ranks)
    tokens = [sum(len(samples[index].token_ids) for index in mine) for mine in dealt]
    count = max(1, -(-max(tokens) // tokens_per_batch))
    count = min(count, max(1, min(len(mine) for mine in dealt)))
    return [
        [[samples[index] for index in batch] or [blank(samples[0])] for batch in _lightest(mine, samples, count)]
        for mine in dealt
    ]


def blank(sample: TrainSample) -> TrainSample:
    """A sample that trains nothing: its reply is counted as prompt."""
    return TrainSample(sample.token_ids, len(sample.token_ids), [], 0.0)


def _lightest(order: list[int], samples: list[TrainSample], bins: int) -> list[list[int]]:
    filled: list[list[int]] = [[] for _ in range(bins)]
    loads = [0] * bins
    for index in order:
        lightest = loads.index(min(loads))
        filled[lightest].append(index)
        loads[lightest] += len(samples[index].token_ids)
    return filled


def policy_batch(samples: list[TrainSample], device: torch.device) -> MicroBatch:
    """Samples packed into one row [1, T]; the last token of each is not an input, the first not a label."""
    ids, labels, masks, rollout, advantages, lengths = [], [], [], [], [], []
    for sample in samples:
        tokens = torch.tensor(sample.token_ids, dtype=torch.int64)
        length, start = len(tokens) - 1, sample.prompt_length - 1
        mask, logprobs = torch.zeros(length), torch.zeros(length)
        mask[start:] = 1.0
        logprobs[start:] = torch.tensor(sample.rollout_logprobs)
        ids.append(tokens[:-1])
        labels.append(tokens[1:])
        masks.append(mask)
        rollout.append(logprobs)
        advantages.append(mask * sample.advantage)
        lengths.append(length)
    return packed_batch(
        ids, labels, masks, lengths, device, {"rollout_logprobs": rollout, "advantages": advantages}
    )
