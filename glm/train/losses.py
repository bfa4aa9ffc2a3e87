"""Next-token loss, told apart by the source of a row and by how far into its document a token stands."""

import torch

from glm.train.batch import MicroBatch

SHORTEST_BAND = 4
BANDS = 6


def next_token_loss(losses: torch.Tensor, batch: MicroBatch):
    """Cross entropy summed over the tokens the mask keeps."""
    total, count = (losses.float() * batch.loss_mask).sum(), batch.loss_mask.sum()
    return total, count.int(), {"loss": torch.stack([total.detach(), count])}


def position_bands(sequence_length: int) -> list[int]:
    """Ends of the bands of positions: the length, a half of it, a quarter …; the first band begins at 0."""
    ends = [sequence_length >> halvings for halvings in range(BANDS)]
    return sorted(end for end in ends if end >= min(SHORTEST_BAND, sequence_length))


class LossByPart:
    """``next_token_loss`` that also tells ``source/NAME`` of every source and ``position/END`` of every band of positions.

    The micro-batch says in ``extra["source"]`` which of ``sources`` a token comes from. Sums are of float64, so that they do not
    depend on how the tokens lie on ranks and in micro-batches.
    """

    def __init__(self, sources: list[str], sequence_length: int):
        self.sources, self.bands = sources, position_bands(sequence_length)
        self.names = [*(f"source/{name}" for name in sources), *(f"position/{end}" for end in self.bands)]

    def __call__(self, losses: torch.Tensor, batch: MicroBatch):
        total, count, metrics = next_token_loss(losses, batch)
        return total, count, metrics | dict(zip(self.names, self._sums(losses, batch)))

    @torch.no_grad()
    def _sums(self, losses: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """[sources + bands, 2]: a product with indicator rows, which needs no atomic additions and nothing from the host."""
        mask = batch.loss_mask.flatten()
        values = torch.stack([losses.float().flatten() * mask, mask], dim=1).double()
        source, position = batch.extra["source"].flatten(), batch.position_ids.flatten()
        begins = [0, *self.bands[:-1]]
        member = [source == index for index in range(len(self.sources))]
        member += [(position >= begin) & (position < end) for begin, end in zip(begins, self.bands)]
        return torch.stack(member).double() @ values
