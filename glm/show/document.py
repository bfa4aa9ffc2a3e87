"""The tables of docs/glm45.md, from glm/show/paper.yaml: ``python -m glm.show.document`` writes them into the document."""

from pathlib import Path

from glm.checkpoint.run_folder import write_atomically
from glm.recipe.compose import load_run
from glm.show.paper import Fact, Row, compare, facts, told

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "glm45.md"
BEGIN, END = "<!-- tables: python -m glm.show.document -->\n", "<!-- end of the tables -->\n"
MODELS = {"355b": "355B", "air": "Air"}


def tables(configs: Path = ROOT / "configs" / "glm45") -> str:
    """One table a topic: what the report says, the recipe key, the code, the test, and the marks of both models' run files."""
    said = facts()
    rows = {model: compare(load_run(configs / f"{model}.yaml"), said) for model in MODELS}
    out = []
    for topic in dict.fromkeys(fact.topic for fact in said):
        out += [f"\n## {topic[0].upper()}{topic[1:]}\n", "| claim | § | report | recipe | key | code | test | mark |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
        out += [_line(fact, [rows[model][index] for model in MODELS]) for index, fact in enumerate(said) if fact.topic == topic]
    return "\n".join(out) + "\n\n"


def _line(fact: Fact, rows: list[Row]) -> str:
    key = f"`{fact.recipe}`" if fact.recipe else "–"
    if fact.recipe and isinstance(fact.where, tuple):
        key = f"`{fact.where[0]}`: {key}"
    note = f": {fact.open or fact.note}" if fact.open or fact.note else ""
    mark = _both([row.mark for row in rows])
    cells = [
        fact.claim, fact.section, "" if fact.open else _both([told(row.paper) for row in rows]), _both([told(row.ours) for row in rows]), key,
        f"`{fact.code}`" if fact.code else "–", f"`{fact.test}`" if fact.test else "–", (f"**{mark}**" if mark != "equal" else mark) + note,
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _both(values: list[str]) -> str:
    """One value where both models agree, else both."""
    return values[0] if len(set(values)) == 1 else ", ".join(f"{name} {value}" for name, value in zip(MODELS.values(), values, strict=True))


def with_tables(document: str) -> str:
    """``document`` with its tables made anew."""
    before, _, rest = document.partition(BEGIN)
    return before + BEGIN + tables() + END + rest.partition(END)[2]


if __name__ == "__main__":
    write_atomically(DOCUMENT, with_tables(DOCUMENT.read_text(encoding="utf-8")))
