"""Rows of data as the tensors of one forward pass, and the part of them that a context-parallel rank holds."""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from glm.model.documents import DocumentGroup, Documents, context_places, gathered_order, lay_out, next_in_document, result_places


@dataclass
class MicroBatch:
    """One forward pass of one rank.

    Plain rows: ``token_ids`` int64 [B, S]. Packed documents: [1, T]. ``labels`` int64, ``loss_mask`` float32,
    ``position_ids`` int64 (from 0 in every document) and every tensor of ``extra`` have the same shape.
    """

    token_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    documents: Documents
    extra: dict[str, torch.Tensor] = field(default_factory=dict)


def plain_batch(token_ids, labels, loss_mask, device: torch.device, extra: dict[str, list] | None = None) -> MicroBatch:
    """Lists of equally long 1-D tensors -> [B, S]; attention is causal over the whole row."""
    ids = torch.stack(token_ids)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    extra = {name: torch.stack(rows) for name, rows in (extra or {}).items()}
    return _whole(ids, torch.stack(labels), torch.stack(loss_mask), positions, [ids.shape[1]], extra, "plain", device)


def packed_batch(
    token_ids, labels, loss_mask, lengths: list[int], device: torch.device, extra: dict[str, list] | None = None, *,
    multiple_of: int = 1,
) -> MicroBatch:
    """Lists of 1-D tensors, concatenated -> [1, T]; attention and positions start anew in each of ``lengths``.

    T is padded to ``multiple_of`` by a last document that trains nothing.
    """
    missing = -sum(lengths) % multiple_of
    lengths = [*lengths, missing] if missing else lengths

    def joined(parts):
        return F.pad(torch.cat(parts), (0, missing))[None]

    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    extra = {name: joined(parts) for name, parts in (extra or {}).items()}
    return _whole(joined(token_ids), joined(labels), joined(loss_mask), positions, lengths, extra, "packed", device)


def micro_batches(
    rows, micro_batch_size: int, packed: bool, device: torch.device, *, multiple_of: int = 1, sources: list[str] | None = None,
) -> list[MicroBatch]:
    """Cuts this rank's rows of a step into forward passes of ``micro_batch_size`` rows, packs padded to ``multiple_of``.

    With ``sources``, ``extra["source"]`` says which of them each token comes from.
    """
    batches = []
    for first in range(0, len(rows), micro_batch_size):
        some = rows[first:first + micro_batch_size]
        tensors = [
            [torch.as_tensor(getattr(row, name)) for row in some] for name in ("token_ids", "labels", "loss_mask")
        ]
        extra = {"source": [torch.full((len(row.token_ids),), sources.index(row.source)) for row in some]} if sources else None
        if packed:
            lengths = [n for row in some for n in row.document_lengths]
            batches.append(packed_batch(*tensors, lengths, device, extra, multiple_of=multiple_of))
        else:
            batches.append(plain_batch(*tensors, device, extra))
    return batches


def context_part(batch: MicroBatch, cp_rank: int, cp_size: int) -> MicroBatch:
    """The places of a whole batch that a context-parallel rank holds; the batch itself for one rank.

    What the MTP layer needs of the token after each one was taken from the whole row, so no part depends on its neighbours.
    """
    if cp_size == 1:
        return batch
    whole = batch.documents
    length = sum(whole.lengths)
    device = batch.token_ids.device
    places = context_places(length, cp_rank, cp_size).to(device)

    def held(rows):
        return rows.index_select(1, places)

    documents = replace(
        _documents(whole.lengths, whole.packed, cp_rank, cp_size, device), order=gathered_order(length, cp_size).to(device),
        mtp_token_ids=held(whole.mtp_token_ids), mtp_labels=held(whole.mtp_labels), mtp_mask=held(whole.mtp_mask),
    )
    return MicroBatch(
        held(batch.token_ids), held(batch.labels), held(batch.loss_mask), held(batch.position_ids), documents,
        {name: held(rows) for name, rows in batch.extra.items()},
    )


def _whole(ids, labels, loss_mask, positions, lengths: list[int], extra, form: str, device: torch.device) -> MicroBatch:
    documents = replace(
        _documents(lengths, form == "packed", 0, 1, device),
        mtp_token_ids=next_in_document(ids, lengths).to(device), mtp_labels=next_in_document(labels, lengths).to(device),
        mtp_mask=next_in_document(loss_mask, lengths).to(device),
    )
    return MicroBatch(
        ids.to(device), labels.to(device), loss_mask.to(device), positions.to(device), documents,
        {name: rows.to(device) for name, rows in extra.items()},
    )


def _documents(lengths: list[int], packed: bool, cp_rank: int, cp_size: int, device: torch.device) -> Documents:
    segments, groups = lay_out(lengths, packed, cp_rank, cp_size)
    moved = [
        DocumentGroup(*(tensor.to(device) for tensor in (group.queries, group.keys, group.real, group.filled, group.tokens)))
        for group in groups
    ]
    results = result_places(segments, groups).to(device)
    return Documents(qkv_format="sbhd", lengths=lengths, packed=packed, segments=segments, groups=moved, results=results)
