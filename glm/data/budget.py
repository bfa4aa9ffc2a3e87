"""What the mixtures of a run ask for, against what there is: tokens and epochs of every source, without opening a corpus.

Several sources may read one corpus (the user's own text stands for every built-in one): it is read their sum, and the least of their
limits holds for it.
"""

import json
from dataclasses import dataclass, replace

from glm.checkpoint.run_folder import RunFolder
from glm.data.batches import EPOCH_SLACK, manifest_path
from glm.data.prepared import prepared_corpora
from glm.data.tokenized import describe, trained_tokens
from glm.recipe.schema import TrainRecipe


@dataclass(frozen=True)
class SourceBudget:
    """One source of one stage."""

    stage: str
    source: str
    corpus: str
    reads: str
    """The corpus as it lies on the disk; before it does, its name in the mixture."""
    asked: int
    """Tokens its share comes to."""
    there: int | None
    """Tokens to train on; None: not prepared yet."""
    at_most: float | None
    """Epochs."""
    corpus_asked: int = 0
    """Tokens that all sources of the stage that read the corpus come to."""
    corpus_at_most: float | None = None
    """The least limit among them."""

    @property
    def epochs(self) -> float | None:
        return self.asked / self.there if self.there else None

    @property
    def corpus_epochs(self) -> float | None:
        return self.corpus_asked / self.there if self.there else None

    @property
    def is_over(self) -> bool:
        epochs, limit = self.corpus_epochs, self.corpus_at_most
        return epochs is not None and limit is not None and epochs > limit + EPOCH_SLACK

    @property
    def least(self) -> int | None:
        """Tokens there must be for the limit to hold."""
        return None if self.corpus_at_most is None else round(self.corpus_asked / self.corpus_at_most)


def stage_budgets(recipe: TrainRecipe) -> list[SourceBudget]:
    """One for each source of the stage's mixture. Raises DataError for a description of a corpus or list that is not readable."""
    folder = RunFolder.of(recipe)
    known = _prepared_by_stages(folder) | _prepared_by(recipe, folder)
    budgets: list[SourceBudget] = []
    for name, source in recipe.data.sources.items():
        reads, there = known.get(source.corpus if source.is_prepared else name, (source.corpus, None))
        budgets.append(SourceBudget(recipe.stage, name, source.corpus, reads, round(source.share * recipe.tokens), there, source.epochs))
    return [_beside(budget, [other for other in budgets if other.reads == budget.reads]) for budget in budgets]


def _beside(budget: SourceBudget, readers: list[SourceBudget]) -> SourceBudget:
    limits = [reader.at_most for reader in readers if reader.at_most is not None]
    return replace(budget, corpus_asked=sum(reader.asked for reader in readers), corpus_at_most=min(limits, default=None))


def totals(budgets: list[SourceBudget]) -> dict[str, float]:
    """Epochs over all given stages of each corpus that several of their sources read, by the names the mixtures give it."""
    readers: dict[str, list[SourceBudget]] = {}
    for budget in budgets:
        if budget.epochs is not None:
            readers.setdefault(budget.reads, []).append(budget)
    return {
        ", ".join(dict.fromkeys(budget.corpus for budget in some)): sum(budget.epochs for budget in some)
        for some in readers.values() if len(some) > 1
    }


def _prepared_by_stages(folder: RunFolder) -> dict[str, tuple[str, int]]:
    """Corpus on the disk and tokens to train on, by the name a mixture gives it."""
    return {
        name: (prepared.corpus, trained_tokens(describe(folder.data, prepared.corpus) or {"tokens": prepared.tokens}))
        for name, prepared in prepared_corpora(folder).items()
    }


def _prepared_by(recipe: TrainRecipe, folder: RunFolder) -> dict[str, tuple[str, int]]:
    """Of the sources that the stage tokenizes itself, once it has begun."""
    path = manifest_path(folder, recipe.stage)
    if not path.is_file():
        return {}
    corpora = json.loads(path.read_text(encoding="utf-8"))["sources"]
    facts = {name: describe(folder.data, corpus) for name, corpus in corpora.items()}
    return {name: (corpora[name], trained_tokens(found)) for name, found in facts.items() if found is not None}
