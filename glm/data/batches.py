"""The rows of a stage, by number: mixture, then packing, then tokens. The same on every rank and after every restart."""

import json
from collections import Counter

import numpy as np

from glm.checkpoint.run_folder import RunFolder
from glm.data.mixture import Interleaving
from glm.data.packing import PackedRows, Row, TruncatedRows
from glm.data.tokenized import TokenizedCorpus, open_corpus
from glm.errors import DataError
from glm.recipe.mixture import mixture_of
from glm.recipe.schema import TrainRecipe

__all__ = ["Batches", "Row", "manifest_path"]

EPOCH_SLACK = 0.05
"""A source may be read this much more often than its limit before it is an error: rows are counted whole."""


def manifest_path(folder: RunFolder, stage: str):
    """Which tokenized corpus each source of a stage reads; written when its data is prepared."""
    return folder.data / f"{stage}.json"


class Batches:
    """Needs ``prepare`` to have run. Raises DataError if the data is missing, torn, or would be read too often."""

    def __init__(self, recipe: TrainRecipe, folder: RunFolder):
        path = manifest_path(folder, recipe.stage)
        if not path.is_file():
            raise DataError(str(path), "no such file", "the prepared data of the stage", "run the stage from its beginning")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        self._recipe = recipe
        self._end_of_text = manifest["end_of_text"]
        mixture = mixture_of(recipe.data)
        self._interleaving = Interleaving({name: source.share for name, source in mixture.sources.items()})
        self._corpora = {name: open_corpus(folder.data, manifest["sources"][name]) for name in mixture.sources}
        self._training = self._packers(lambda corpus: corpus.training_documents, "training")
        self._validation = self._packers(lambda corpus: corpus.validation_documents, "validation")
        self._check_epochs({name: source.epochs for name, source in mixture.sources.items()})

    def _packers(self, documents_of, purpose: str) -> dict[str, TruncatedRows | PackedRows]:
        return {name: self._packer(name, corpus, documents_of(corpus), purpose) for name, corpus in self._corpora.items()}

    def _packer(self, name: str, corpus: TokenizedCorpus, documents: np.ndarray, purpose: str) -> TruncatedRows | PackedRows:
        recipe = self._recipe
        seed = (recipe.seed, recipe.stage, name, purpose)
        if recipe.data.packing == "truncate":
            return TruncatedRows(corpus, documents, recipe.sequence_length, self._end_of_text, name, *seed)
        return PackedRows(corpus, documents, recipe.sequence_length, name, recipe.main == "posttrain.sft", *seed)

    @property
    def stage_rows(self) -> int:
        """Rows the stage's tokens come to."""
        return -(-self._recipe.tokens // self._recipe.sequence_length)

    def _check_epochs(self, limits: dict[str, float | None]) -> None:
        for name, rows in self._interleaving.counts(self.stage_rows).items():
            limit = limits[name]
            epochs = self._training[name].epochs(rows) if limit is not None else 0.0
            if limit is not None and epochs > limit + EPOCH_SLACK:
                raise DataError(
                    f"source {name} of mixture {self._recipe.data.mixture}",
                    f"{epochs:.2f} epochs in {self._recipe.tokens} tokens", f"at most {limit:g}",
                    "lower its share or the stage's tokens, or give more documents",
                )

    def rows(self, first: int, count: int) -> list[Row]:
        """Training rows first … first + count - 1 of the stage."""
        return [self._training[source].row(number) for source, number in self._interleaving.rows(first, count)]

    def sources(self, first: int, count: int) -> dict[str, int]:
        """How many of these rows come from each source; reads no data."""
        return dict(Counter(source for source, _ in self._interleaving.rows(first, count)))

    def validation_rows(self, count: int) -> list[Row]:
        """Rows of held-out documents in the stage's proportions; a small held-out source comes again."""
        return [self._validation[source].row(number) for source, number in self._interleaving.rows(0, count)]

    def report(self) -> dict[str, dict[str, object]]:
        """For each source: documents, tokens, rows the stage takes, epochs they come to, and how full packed rows are."""
        lines: dict[str, dict[str, object]] = {}
        for name, rows in self._interleaving.counts(self.stage_rows).items():
            corpus, packer = self._corpora[name], self._training[name]
            training = corpus.training_documents
            lines[name] = {
                "corpus": corpus.name, "documents": len(training), "tokens": int(corpus.lengths(training).sum()),
                "validation_documents": len(corpus.validation_documents), "rows": rows, "epochs": round(packer.epochs(rows), 3),
            }
            if isinstance(packer, PackedRows):
                lines[name]["filled"] = round(packer.filled(), 4)
        return lines
