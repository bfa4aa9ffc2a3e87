"""The layouts that must give what one rank gives, and the training they are compared on. Imports no torch."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Case:
    """One way of dividing ``ranks`` processes."""

    ranks: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    pipeline_layers: tuple[int, ...] | None = None
    packed: bool = False
    micro_batch: int = 2
    bare: bool = False
    """No masked tokens and no MTP loss."""
    trap: str | None = None
    """A default of megatron put back in place of ours (tests.layout.traps)."""

    @classmethod
    def from_json(cls, fields: dict) -> "Case":
        layers = fields["pipeline_layers"]
        return cls(**fields | {"pipeline_layers": tuple(layers) if layers else None})

    @property
    def name(self) -> str:
        """Such as ``tp2 ep2``; dp is what the others leave."""
        dp = self.ranks // (self.tp * self.pp * self.cp)
        sizes = {"dp": dp, "tp": self.tp, "pp": self.pp, "vpp": self.vpp, "cp": self.cp, "ep": self.ep, "etp": self.etp}
        parts = [f"{axis}{size}" for axis, size in sizes.items() if size > 1]
        if self.pipeline_layers:
            parts.append("layers " + "+".join(map(str, self.pipeline_layers)))
        if self.micro_batch != 2:
            parts.append(f"micro-batch {self.micro_batch}")
        if self.bare:
            parts.append("bare")
        return " ".join(parts or ["one rank"])

    @property
    def label(self) -> str:
        return self.name + (", packed" if self.packed else "") + (f", {self.trap}" if self.trap else "")

    @property
    def reference(self) -> "Case":
        """What it is compared with: the same on one rank, in micro-batches of two rows."""
        return Case(1, packed=self.packed, bare=self.bare)

    @property
    def layout(self) -> dict:
        return {axis: getattr(self, axis) for axis in ("tp", "pp", "vpp", "cp", "ep", "etp", "pipeline_layers")}

    def as_json(self) -> dict:
        return asdict(self)


_ONE_RANK = (dict(micro_batch=1),)
_TWO_RANKS = (
    dict(), dict(tp=2), dict(tp=2, etp=2), dict(tp=2, ep=2), dict(ep=2), dict(etp=2), dict(pp=2), dict(pp=2, vpp=2),
    dict(pp=2, pipeline_layers=(1, 3)), dict(cp=2), dict(cp=2, ep=2), dict(micro_batch=4),
)
_THREE_RANKS = (dict(pp=3),)
_FOUR_RANKS = (
    dict(), dict(ep=2), dict(ep=4), dict(ep=2, etp=2), dict(tp=2), dict(tp=2, ep=2), dict(tp=2, ep=4), dict(tp=2, etp=2),
    dict(tp=2, ep=2, etp=2), dict(pp=2), dict(pp=4), dict(pp=2, ep=2), dict(pp=2, vpp=2), dict(pp=2, vpp=2, ep=2), dict(pp=2, etp=2),
    dict(tp=2, pp=2), dict(tp=2, pp=2, ep=2), dict(tp=2, pp=2, etp=2), dict(tp=2, pp=2, vpp=2), dict(cp=4), dict(cp=2), dict(cp=2, ep=2),
    dict(cp=2, ep=4), dict(cp=2, etp=2), dict(tp=2, cp=2), dict(tp=2, cp=2, ep=2), dict(tp=2, cp=2, etp=2), dict(pp=2, cp=2),
    dict(pp=2, vpp=2, cp=2), dict(pp=2, cp=2, ep=2),
)
QUICK = (
    Case(2), Case(2, ep=2, packed=True), Case(2, tp=2, packed=True), Case(2, tp=2, etp=2), Case(2, tp=2, ep=2), Case(2, pp=2),
    Case(2, pp=2, vpp=2, packed=True), Case(2, pp=2, pipeline_layers=(1, 3)), Case(2, cp=2), Case(2, cp=2, packed=True),
)
"""Two ranks: every axis once, plain or packed."""
FULL = tuple(
    Case(ranks, packed=packed, **axes)
    for ranks, table in enumerate((_ONE_RANK, _TWO_RANKS, _THREE_RANKS, _FOUR_RANKS), start=1) for axes in table
    for packed in ((False,) if "micro_batch" in axes else (False, True))
)
"""Every axis, and pairs and triples of them, plain and packed; and other sizes of a micro-batch."""
TRAPPED = (
    Case(2, tp=2, trap="expert_gradients_in_the_dense_group"), Case(2, tp=2, ep=2, micro_batch=1, bare=True, trap="balance_weight_by_local_tokens"),
    Case(2, cp=2, bare=True, trap="loss_in_two_parts"), Case(2, pp=2, vpp=2, trap="batched_messages_between_two_interleaved_stages"),
)
"""Each must differ from one rank; without the trap each equals it."""
HARMLESS = (
    Case(1, trap="expert_gradients_in_the_dense_group"), Case(1, micro_batch=1, bare=True, trap="balance_weight_by_local_tokens"),
    Case(1, bare=True, trap="loss_in_two_parts"), Case(1, trap="batched_messages_between_two_interleaved_stages"),
)
"""The same traps on one rank, where they must change nothing: it is the layout that springs them."""
ROWS_TRAPPED = Case(1, bare=True, trap="balance_weight_by_local_tokens")
"""On one rank with two rows a micro-batch this one does: the weight is divided by the rows."""

STEPS = 5
ROWS, LENGTH = 8, 16
DOCUMENTS = ((10, 6), (3, 1, 12), (16,), (5, 5, 4, 2))
"""Lengths of the documents of a packed row, row by row in turn."""
SEED = {False: 200, True: 25}
"""Of the data, plain and packed: in the single-rank run no token is so close between two experts that rounding could move it."""


def by_ranks(cases: tuple[Case, ...]) -> dict[int, list[Case]]:
    groups: dict[int, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.ranks, []).append(case)
    return groups
