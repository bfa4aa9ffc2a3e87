"""What the mixtures of a run ask for, against what there is: tokens and epochs of every source, without opening a corpus."""

import json
from dataclasses import dataclass

from glm.checkpoint.run_folder import RunFolder
from glm.data.batches import EPOCH_SLACK, manifest_path
from glm.data.prepared import prepared_corpora
from glm.data.tokenized import HELD_OUT_MODULUS, read_facts
from glm.recipe.schema import TrainRecipe


@dataclass(frozen=True)
class SourceBudget:
    """One source of one stage."""

    stage: str
    source: str
    corpus: str
    asked: int
    """Tokens its share comes to."""
    there: int | None
    """Tokens to train on; None: not prepared yet."""
    at_most: float | None
    """Epochs."""

    @property
    def epochs(self) -> float | None:
        return self.asked / self.there if self.there else None

    @property
    def is_over(self) -> bool:
        return self.epochs is not None and self.at_most is not None and self.epochs > self.at_most + EPOCH_SLACK

    @property
    def least(self) -> int | None:
        """Tokens there must be for the limit to hold."""
        return None if self.at_most is None else round(self.asked / self.at_most)


def stage_budgets(recipe: TrainRecipe) -> list[SourceBudget]:
    """One for each source of the stage's mixture. Raises DataError for a torn corpus or list of corpora."""
    folder = RunFolder.of(recipe)
    there = _prepared_by_stages(folder) | _prepared_by(recipe, folder)
    return [
        SourceBudget(recipe.stage, name, source.corpus, round(source.share * recipe.tokens),
                     there.get(source.corpus if source.is_prepared else name), source.epochs)
        for name, source in recipe.data.sources.items()
    ]


def totals(budgets: list[SourceBudget]) -> dict[str, float]:
    """Epochs over all given stages of each prepared corpus that several of them read."""
    epochs: dict[str, list[float]] = {}
    for budget in budgets:
        if "/" in budget.corpus and budget.epochs is not None:
            epochs.setdefault(budget.corpus, []).append(budget.epochs)
    return {corpus: sum(parts) for corpus, parts in epochs.items() if len(parts) > 1}


def _trained_on(tokens: int) -> int:
    return tokens - tokens // HELD_OUT_MODULUS


def _prepared_by_stages(folder: RunFolder) -> dict[str, int]:
    return {name: _trained_on(prepared.tokens) for name, prepared in prepared_corpora(folder).items()}


def _prepared_by(recipe: TrainRecipe, folder: RunFolder) -> dict[str, int]:
    """Of the sources that the stage tokenizes itself, once it has begun."""
    path = manifest_path(folder, recipe.stage)
    if not path.is_file():
        return {}
    corpora = json.loads(path.read_text(encoding="utf-8"))["sources"]
    facts = {name: read_facts(folder.data, corpus) for name, corpus in corpora.items()}
    return {name: _trained_on(found["tokens"]) for name, found in facts.items() if found is not None}
