"""The rows of a stage, by number: mixture, then packing, then tokens. The same on every rank and after every restart."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from glm.checkpoint.run_folder import RunFolder, sync
from glm.data.blocks import Blocks
from glm.data.mixture import Interleaving
from glm.data.packing import PackedRows, Row, TruncatedRows
from glm.data.tokenized import TokenizedCorpus, open_corpus
from glm.errors import DataError
from glm.recipe.mixture import mixture_of
from glm.recipe.schema import TrainRecipe

__all__ = ["Batches", "Consumed", "Row", "manifest_path"]

EPOCH_SLACK = 0.05
"""A source may be read this much more often than its limit before it is an error: rows are counted whole."""
COUNTS_FORMAT = 1
"""Raised when the same documents are packed or counted in another way."""


def manifest_path(folder: RunFolder, stage: str):
    """Which tokenized corpus each source of a stage reads; written when its data is prepared."""
    return folder.data / f"{stage}.json"


@dataclass(frozen=True)
class Consumed:
    """Of one source. Tokens are those in the rows: empty places are none."""

    rows: int = 0
    tokens: int = 0
    epochs: float = 0.0

    def __add__(self, other: "Consumed") -> "Consumed":
        return Consumed(self.rows + other.rows, self.tokens + other.tokens, self.epochs + other.epochs)


class Batches:
    """Needs ``prepare`` to have run. Raises DataError if the data is missing, torn, or would be read too often."""

    def __init__(self, recipe: TrainRecipe, folder: RunFolder):
        path = manifest_path(folder, recipe.stage)
        if not path.is_file():
            raise DataError(str(path), "no such file", "the prepared data of the stage", "run the stage from its beginning")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        self._recipe, self._folder = recipe, folder
        self._end_of_text = manifest["end_of_text"]
        self._sources = mixture_of(recipe.data).sources
        self._corpora = {name: open_corpus(folder.data, manifest["sources"][name]) for name in self._sources}
        self._training = {name: self._packer(name, corpus, "training") for name, corpus in self._corpora.items()}
        self._validation = {name: self._packer(name, corpus, "validation") for name, corpus in self._corpora.items()}
        # shares are of tokens: a source whose rows are less full gives more of them
        weights = {name: source.share / self._training[name].filled() for name, source in self._sources.items()}
        self._interleaving = Interleaving(weights)
        self._check_epochs()

    def _packer(self, name: str, corpus: TokenizedCorpus, purpose: str) -> TruncatedRows | PackedRows:
        recipe, held_out = self._recipe, purpose == "validation"
        counts = self._counted(lambda: Blocks(corpus, held_out=held_out).counts, corpus, held_out)
        blocks = Blocks(corpus, held_out=held_out, counts=counts)
        if not blocks.num_documents:
            raise DataError(
                f"source {name} of mixture {recipe.data.mixture}", f"no document for {purpose} among {corpus.num_documents} of {corpus.name}",
                "some text to train on and some to validate with", "give more text: one document in fifty is held out",
            )
        seed = (recipe.seed, recipe.stage, name, purpose)
        length = recipe.sequence_length
        if recipe.data.packing == "truncate":
            return TruncatedRows(blocks, length, self._end_of_text, name, *seed)
        assistant_only = recipe.main == "posttrain.sft"
        counts = self._counted(lambda: PackedRows(blocks, length, name, assistant_only, *seed).counts, corpus, length, *seed)
        return PackedRows(blocks, length, name, assistant_only, *seed, counts=counts)

    def _counted(self, count: Callable[[], np.ndarray], corpus: TokenizedCorpus, *parts: object) -> np.ndarray:
        """What ``count`` gives, kept in RUN/data/counts: a restart reads neither the index of a corpus nor packs it again."""
        key = hashlib.blake2b(json.dumps([COUNTS_FORMAT, corpus.fingerprint, *parts]).encode(), digest_size=8).hexdigest()
        path = self._folder.data / "counts" / f"{corpus.name}-{key}.npy"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            with draft.open("wb") as out:
                np.save(out, count())
            sync(draft)
            draft.replace(path)
        return np.load(path)

    @property
    def stage_rows(self) -> int:
        """Rows the stage's tokens come to."""
        return -(-self._recipe.tokens // self._recipe.sequence_length)

    def _check_epochs(self) -> None:
        for names in self._readers.values():
            limits = [limit for name in names if (limit := self._sources[name].epochs) is not None]
            epochs = self._epochs_of(names)
            if limits and epochs > min(limits) + EPOCH_SLACK:
                one = len(names) == 1
                raise DataError(
                    f"source{'' if one else 's'} {', '.join(names)} of mixture {self._recipe.data.mixture}",
                    f"{epochs:.2f} epochs{'' if one else ' of the one corpus they read'} in {self._recipe.tokens} tokens",
                    f"at most {min(limits):g}",
                    "lower the share or the stage's tokens, give more documents, or raise data.sources.NAME.epochs",
                )

    @cached_property
    def _readers(self) -> dict[str, list[str]]:
        """The sources that read each corpus."""
        readers: dict[str, list[str]] = {}
        for name, corpus in self._corpora.items():
            readers.setdefault(corpus.name, []).append(name)
        return readers

    def _epochs_of(self, names: list[str]) -> float:
        rows = self._interleaving.counts(self.stage_rows)
        return sum(self._training[name].epochs(rows[name]) for name in names)

    def rows(self, first: int, count: int) -> list[Row]:
        """Training rows first … first + count - 1 of the stage."""
        return [self._training[source].row(number) for source, number in self._interleaving.rows(first, count)]

    def sources(self, first: int, count: int) -> dict[str, int]:
        """How many of these rows come from each source; reads no data."""
        return dict(Counter(source for source, _ in self._interleaving.rows(first, count)))

    def validation_rows(self, count: int) -> list[Row]:
        """Rows of held-out documents in the stage's proportions; a small held-out source comes again."""
        return [self._validation[source].row(number) for source, number in self._interleaving.rows(0, count)]

    def ledger(self, stage_rows: int) -> dict[str, Consumed]:
        """What the first ``stage_rows`` rows of the stage took from each source."""
        return self.ledger_of([(0, stage_rows)])

    def ledger_of(self, pieces: list[tuple[int, int]]) -> dict[str, Consumed]:
        """What runs of rows, each (first, count), took from each source; reads no tokens."""
        taken = dict.fromkeys(self._sources, Consumed())
        for first, count in pieces:
            before, after = self._interleaving.counts(first), self._interleaving.counts(first + count)
            for name, packer in self._training.items():
                one, two = before[name], after[name]
                taken[name] += Consumed(two - one, packer.tokens(two) - packer.tokens(one), packer.epochs(two) - packer.epochs(one))
        return taken

    def report(self) -> dict[str, dict[str, object]]:
        """For each source: documents, tokens, rows the stage takes, epochs they come to, those of its corpus with all sources that read
        it, and how full packed rows are."""
        lines: dict[str, dict[str, object]] = {}
        for name, rows in self._interleaving.counts(self.stage_rows).items():
            packer = self._training[name]
            lines[name] = {
                "corpus": self._corpora[name].name, "documents": packer.blocks.num_documents, "tokens": packer.blocks.num_tokens,
                "validation_documents": self._validation[name].blocks.num_documents, "rows": rows, "epochs": round(packer.epochs(rows), 3),
                "corpus_epochs": round(self._epochs_of(self._readers[self._corpora[name].name]), 3),
            }
            if isinstance(packer, PackedRows):
                lines[name]["filled"] = round(packer.filled(), 4)
        return lines
