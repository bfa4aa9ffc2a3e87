"""``KEY=VALUE`` from the command line: ``seed=1``, ``data.documents=PATH``, ``rl_reasoning.rl.steps=10``."""

from dataclasses import dataclass
from typing import Mapping, Sequence

from glm.errors import RecipeError
from glm.recipe.schema import StageRecipe
from glm.recipe.source import Placed, nearest, parse_value
from glm.recipe.typed import field_types


@dataclass(frozen=True)
class Override:
    """One KEY=VALUE."""

    key: str
    value: Placed

    @property
    def origin(self) -> str:
        return f"command line: {self.key}={self.value.value}" if not self.value.is_map else f"command line: {self.key}"

    def target(self, kinds: Mapping[str, type[StageRecipe]]) -> tuple[str | None, str]:
        """The one stage it speaks of (none: all that have the section), and the section.

        A first word that is both (``tokenizer``) is the stage if the second word is one of that stage's sections.
        """
        first, _, rest = self.key.partition(".")
        second = rest.partition(".")[0]
        sections = set().union(*(field_types(kind) for kind in kinds.values()))
        if first in kinds and (second in field_types(kinds[first]) or first not in sections):
            if second not in field_types(kinds[first]):
                raise RecipeError(
                    self.origin, f"unknown key `{second}` of stage {first}", "STAGE.SECTION.KEY=VALUE", nearest(second, field_types(kinds[first]))
                )
            return first, second
        if first not in sections:
            known = sections | set(kinds) | {"run_folder"}
            raise RecipeError(self.origin, f"unknown key `{first}`", "a section, or a stage and a section", nearest(first, known))
        return None, first

    def nested(self, stage: str | None) -> Placed:
        """The value inside the maps its key spells, without the stage."""
        words = self.key.split(".")
        placed = self.value
        for word in reversed(words[1:] if stage else words):
            placed = Placed({word: placed}, "command line")
        return placed


def parse_overrides(texts: Sequence[str]) -> list[Override]:
    """In order. Raises RecipeError for anything but ``KEY=VALUE``, and for a key that is set twice: one of the two is a mistake."""
    changes: dict[str, Override] = {}
    for text in texts:
        change = parse_override(text)
        if change.key in changes:
            raise RecipeError(
                "command line", f"{change.key} set twice ({text} after {change.key}={changes[change.key].value.value})", "each key once",
                "remove one of the two",
            )
        changes[change.key] = change
    return list(changes.values())


def parse_override(text: str) -> Override:
    """Raises RecipeError for anything but ``KEY=VALUE``."""
    key, equals, value = text.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise RecipeError("command line", repr(text), "KEY=VALUE, such as seed=1 or rl_reasoning.rl.steps=10", "write it so")
    return Override(key, parse_value(value, "command line"))
