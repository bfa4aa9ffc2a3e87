"""Rows of data as the tensors of one forward pass."""

from dataclasses import dataclass, field

import torch

from glm.model.attention import pack_params


@dataclass
class MicroBatch:
    """One forward pass of one rank.

    Plain: ``token_ids`` int64 [B, S]. Packed: [1, T] with the documents' bounds in ``packed``. ``labels`` int64,
    ``loss_mask`` float32 and every tensor of ``extra`` have the same shape.
    """

    token_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    packed: object | None = None
    extra: dict[str, torch.Tensor] = field(default_factory=dict)


def plain_batch(token_ids, labels, loss_mask, device: torch.device) -> MicroBatch:
    """Lists of equally long 1-D tensors -> [B, S]; attention is causal over the whole row."""
    ids = torch.stack(token_ids).to(device)
    positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
    return MicroBatch(ids, torch.stack(labels).to(device), torch.stack(loss_mask).to(device), positions)


def packed_batch(
    token_ids, labels, loss_mask, lengths: list[int], device: torch.device, extra: dict[str, list] | None = None,
) -> MicroBatch:
    """Lists of 1-D tensors, concatenated -> [1, T]; attention and positions start anew in each of ``lengths``."""
    def joined(parts):
        return torch.cat(parts).to(device)[None]

    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)[None]
    return MicroBatch(
        joined(token_ids), joined(labels), joined(loss_mask), positions, pack_params(lengths, device),
        {name: joined(parts) for name, parts in (extra or {}).items()},
    )


def micro_batches(rows, micro_batch_size: int, packed: bool, device: torch.device) -> list[MicroBatch]:
    """Cuts this rank's rows of a step into forward passes of ``micro_batch_size`` rows."""
    batches = []
    for first in range(0, len(rows), micro_batch_size):
        some = rows[first:first + micro_batch_size]
        tensors = [
            [torch.as_tensor(getattr(row, name)) for row in some] for name in ("token_ids", "labels", "loss_mask")
        ]
        if packed:
            batches.append(packed_batch(*tensors, [n for row in some for n in row.document_lengths], device))
        else:
            batches.append(plain_batch(*tensors, device))
    return batches
