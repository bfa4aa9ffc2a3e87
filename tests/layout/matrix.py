"""The table of docs/numerics.md: written from a run of the matrix, and read back to see that it is of this matrix."""

from pathlib import Path

from tests.layout.cases import Case
from tests.layout.compare import Difference

BEGIN, END = "<!-- layouts: written by pytest -m full tests/layout --write-matrix -->", "<!-- layouts: end -->"
HEADER = (
    "| ranks | layout | loss | MTP loss | gradients | bit for bit | weights after 5 steps |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)


def replace_table(document: Path, cases: tuple[Case, ...], found: dict[str, Difference]) -> None:
    """Puts the table of ``found`` between the two marks."""
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = [BEGIN, *HEADER, *(_row(case, found[case.label]) for case in cases), END]
    document.write_text(before + "\n".join(lines) + after, encoding="utf-8")


def names_in(text: str) -> list[str]:
    """Labels of the cases a document's table has, in its order."""
    table = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()[len(HEADER):]
    return [line.split("|")[2].strip() for line in table]


def _row(case: Case, seen: Difference) -> str:
    cells = (
        str(case.ranks), case.label, f"{seen.loss:.1e}", f"{seen.mtp_loss:.1e}", f"{seen.gradient[0]:.1e}",
        f"{seen.equal_gradients} of {seen.gradients}", f"{seen.weight[0]:.1e}",
    )
    return f"| {' | '.join(cells)} |"
