"""Data mixtures: which corpora a stage reads, and how much of each."""

from pathlib import Path

from pydantic import model_validator

from glm.errors import RecipeError
from glm.recipe.sections import Data, Section, Source, check_shares
from glm.recipe.source import Placed, nearest, plain, read_yaml, shown
from glm.recipe.typed import build

CONFIGS = Path(__file__).parents[2] / "configs" / "glm45"
"""Where mixtures are looked up by name when nothing else is said."""


class Mixture(Section):
    """Sources of a stage. The shares are of tokens and sum to 1."""

    sources: dict[str, Source]

    @model_validator(mode="after")
    def _sums_to_one(self):
        check_shares(self.sources)
        return self


def read_mixture(name: str, configs: Path | None = None, *, asked_at: str | None = None) -> Placed:
    """The sources in ``configs/mixture/NAME.yaml`` with their lines. RecipeError if missing or wrong; ``asked_at`` names it."""
    folder = (configs or CONFIGS) / "mixture"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = [other.stem for other in folder.glob("*.yaml")]
        raise RecipeError(asked_at or shown(path), f"mixture {name!r}", f"a file {shown(path)}", nearest(name, known))
    placed = read_yaml(path)
    build(Mixture, placed)
    return placed.value["sources"]


def load_mixture(name: str, configs: Path | None = None) -> Mixture:
    """As read_mixture, typed."""
    return Mixture.model_validate({"sources": plain(read_mixture(name, configs))})


def mixture_of(data: Data) -> Mixture:
    """The mixture of a recipe's ``data`` section: as resolved into the recipe, else the file it names."""
    return Mixture(sources=data.sources) if data.sources else load_mixture(data.mixture)
