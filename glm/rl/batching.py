"""Training samples as micro-batches: every rank the same number of them, all of similar length."""

import torch

from glm.train.batch import MicroBatch, packed_batch
from glm.rl.types import TrainSample


def deal(samples: list[TrainSample], ranks: int, tokens_per_batch: int, count_multiple: int = 1) -> list[list[list[TrainSample]]]:
    """[rank][micro-batch][sample]: longest first, each to the rank with the fewest tokens; there into the first batch with room.

    No batch exceeds ``tokens_per_batch`` but for a single sample that does. Every rank gets the same number of batches, because
    expert dispatch is collective, and a multiple of ``count_multiple``: a rank with fewer gets ``blank`` ones.
    """
    order = sorted(range(len(samples)), key=lambda index: (-len(samples[index].token_ids), index))
    shares: list[list[TrainSample]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in order:
        lightest = loads.index(min(loads))
        shares[lightest].append(samples[index])
        loads[lightest] += len(samples[index].token_ids)
    dealt = [_first_fit(share, tokens_per_batch) for share in shares]
    count = max(len(batches) for batches in dealt)
    count += -count % count_multiple
    return [batches + [[blank(samples[-1])]] * (count - len(batches)) for batches in dealt]


def _first_fit(samples: list[TrainSample], limit: int) -> list[list[TrainSample]]:
    batches: list[list[TrainSample]] = []
    loads: list[int] = []
    for sample in samples:
        size = len(sample.token_ids)
        at = next((number for number, load in enumerate(loads) if load + size <= limit), len(batches))
        if at == len(batches):
            batches.append([])
            loads.append(0)
        batches[at].append(sample)
        loads[at] += size
    return batches


def blank(sample: TrainSample) -> TrainSample:
    """A sample that trains nothing: its reply is counted as prompt."""
    return TrainSample(sample.token_ids, len(sample.token_ids), [], 0.0)


def policy_batch(samples: list[TrainSample], device: torch.device, *, multiple_of: int = 1) -> MicroBatch:
    """Samples packed into one row [1, T]; the last token of each is not an input, the first not a label.

    T is a multiple of ``multiple_of`` (Trainer.row_multiple).
    """
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
        ids, labels, masks, lengths, device, {"rollout_logprobs": rollout, "advantages": advantages}, multiple_of=multiple_of,
    )
