"""The largest attention logit of a layer, before softmax, without keeping a matrix of queries x keys.

Legend: S queries (of this rank), R keys of the whole row, B batch, N query heads, G key/value heads, D head dimension.
"""

import torch

from glm.model.documents import Documents, context_places

SAMPLED_QUERIES = 256
"""Queries of a row that are looked at, evenly spread and the last one included; all of a shorter row."""
BLOCK = 1 << 25
"""Logits at a time."""


class LogitWatch:
    """Keeps the largest logit of the forward passes while it is ``on``. A rank sees its own heads, rows and queries."""

    def __init__(self):
        self.on = False
        self.largest: torch.Tensor | None = None

    def take(self) -> torch.Tensor | None:
        """float32 scalar since the last call; None when nothing was seen."""
        taken, self.largest = self.largest, None
        return taken

    @torch.no_grad()
    def see(
        self, query_SBND: torch.Tensor, key_RBGD: torch.Tensor, scale: float, documents: Documents | None, cp_rank: int, cp_size: int,
    ) -> None:
        """Documents None: whole causal rows."""
        places_S, starts_S = _places(query_SBND.shape[0], documents, cp_rank, cp_size, query_SBND.device)
        found = largest_logit(query_SBND, key_RBGD, places_S, starts_S, scale)
        self.largest = found if self.largest is None else torch.maximum(self.largest, found)


def largest_logit(
    query_SBND: torch.Tensor, key_RBGD: torch.Tensor, places_S: torch.Tensor, starts_S: torch.Tensor, scale: float,
) -> torch.Tensor:
    """float32 scalar: max of scale x query . key over sampled queries and the keys they see, from ``starts`` to their place."""
    S, B, N, D = query_SBND.shape
    R, G = key_RBGD.shape[0], key_RBGD.shape[2]
    count = min(S, SAMPLED_QUERIES)
    sampled = (torch.arange(1, count + 1, device=query_SBND.device) * S) // count - 1
    columns = torch.arange(R, device=query_SBND.device)
    keys_BGDR = key_RBGD.permute(1, 2, 3, 0)
    largest = torch.full((), -torch.inf, device=query_SBND.device)
    for some in sampled.split(max(1, BLOCK // (B * N * R))):
        queries = query_SBND.index_select(0, some).unflatten(2, (G, N // G)).permute(1, 2, 0, 3, 4)    # [B, G, queries, N / G, D]
        logits = queries.flatten(2, 3) @ keys_BGDR
        hidden = (columns > places_S[some, None]) | (columns < starts_S[some, None])
        logits.unflatten(2, (-1, N // G)).masked_fill_(hidden[:, None, :], -torch.inf)
        largest = torch.maximum(largest, logits.amax().float())
    return largest * scale


def _places(queries: int, documents: Documents | None, cp_rank: int, cp_size: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [S]: the place of each query in the whole row, and where its document begins. Made once a batch, not once a layer."""
    if documents is None:
        return torch.arange(queries, device=device), torch.zeros(queries, dtype=torch.int64, device=device)
    if documents.spans is None:
        lengths = torch.tensor(documents.lengths)
        starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        places = context_places(len(starts), cp_rank, cp_size)
        documents.spans = places.to(device), starts[places].to(device)
    return documents.spans
