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

    @property
    def name(self) -> str:
        """Such as ``tp2 ep2, packed``; dp is what the others leave."""
        dp = self.ranks // (self.tp * self.pp * self.cp)
        sizes = {"dp": dp, "tp": self.tp, "pp": self.pp, "vpp": self.vpp, "cp": self.cp, "ep": self.ep, "etp": self.etp}
        parts = [f"{axis}{size}" for axis, size in sizes.items() if size > 1]
        if self.pipeline_layers:
            parts.append("layers " + "+".join(map(str, self.pipeline_layers)))
        return " ".join(parts or ["one rank"]) + (", packed" if self.packed else "")

    @property
    def layout(self) -> dict:
        return {name: value for name, value in asdict(self).items() if name not in ("ranks", "packed")}


ONE = (Case(1), Case(1, packed=True))
QUICK = (
    Case(2), Case(2, tp=2, etp=1, packed=True), Case(2, tp=2, etp=2), Case(2, tp=2, ep=2), Case(2, ep=2, packed=True),
    Case(2, pp=2), Case(2, pp=2, vpp=2, packed=True), Case(2, pp=2, pipeline_layers=(1, 3)), Case(2, cp=2), Case(2, cp=2, packed=True),
)
"""Two ranks: every axis once, plain or packed."""
_AXES = (
    dict(ranks=2), dict(ranks=2, tp=2), dict(ranks=2, tp=2, etp=2), dict(ranks=2, tp=2, ep=2), dict(ranks=2, ep=2), dict(ranks=2, pp=2),
    dict(ranks=2, pp=2, vpp=2), dict(ranks=2, pp=2, pipeline_layers=(1, 3)), dict(ranks=2, cp=2), dict(ranks=2, cp=2, ep=2),
    dict(ranks=3, pp=3), dict(ranks=4), dict(ranks=4, ep=4), dict(ranks=4, ep=2), dict(ranks=4, tp=2), dict(ranks=4, tp=2, ep=2),
    dict(ranks=4, tp=2, ep=4), dict(ranks=4, tp=2, etp=2), dict(ranks=4, tp=2, ep=2, etp=2), dict(ranks=4, pp=2), dict(ranks=4, pp=4),
    dict(ranks=4, pp=2, ep=2), dict(ranks=4, pp=2, vpp=2, ep=2), dict(ranks=4, tp=2, pp=2), dict(ranks=4, tp=2, pp=2, ep=2),
    dict(ranks=4, tp=2, pp=2, etp=2), dict(ranks=4, tp=2, pp=2, vpp=2), dict(ranks=4, cp=4), dict(ranks=4, cp=2), dict(ranks=4, cp=2, ep=2),
    dict(ranks=4, cp=2, ep=4), dict(ranks=4, tp=2, cp=2), dict(ranks=4, tp=2, cp=2, ep=2), dict(ranks=4, tp=2, cp=2, etp=2),
    dict(ranks=4, pp=2, cp=2), dict(ranks=4, pp=2, vpp=2, cp=2), dict(ranks=4, pp=2, cp=2, ep=2),
)
FULL = tuple(Case(packed=packed, **axes) for axes in _AXES for packed in (False, True))
"""Every axis, and pairs and triples of them, plain and packed."""

STEPS = 5
ROWS, LENGTH, MICRO_BATCH = 8, 16, 2
DOCUMENTS = ((10, 6), (3, 1, 12), (16,), (5, 5, 4, 2))
"""Lengths of the documents of a packed row, row by row in turn."""

SEED = {False: 1, True: 18}
"""Of the data, plain and packed: in the single-rank run no token is so close between two experts that rounding could move it."""
