"""The corpora that prepare stages made, by the name a mixture gives them: NAME/BUCKET."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from glm.checkpoint.run_folder import RunFolder
from glm.data.tokenized import read_facts
from glm.errors import DataError


@dataclass(frozen=True)
class Prepared:
    """A corpus in RUN/data, and what its prepare stage counted in it."""

    corpus: str
    documents: int
    tokens: int


def prepared_corpora(folder: RunFolder) -> dict[str, Prepared]:
    """What RUN/data/prepared.json lists; nothing before the first prepare stage. Raises DataError if it is not readable."""
    if not folder.prepared.is_file():
        return {}
    try:
        entries = json.loads(folder.prepared.read_text(encoding="utf-8"))
        return {name: Prepared(entry["corpus"], entry["documents"], entry["tokens"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        todo = "run the prepare stages again; what they finished is not made twice"
        raise DataError(str(folder.prepared), f"not readable: {error!r}", "a list of prepared corpora", todo) from error


def prepared_corpus(folder: RunFolder, name: str, *, asked_by: str) -> Prepared:
    """Raises DataError, with the names there are, if no stage of the run made the corpus."""
    known = prepared_corpora(folder)
    if name not in known:
        raise DataError(
            asked_by, f"corpus {name!r}, which is not in {folder.prepared}",
            "one of " + ", ".join(sorted(known)) if known else "a corpus that a prepare stage made; none has run in this run folder",
            f"run the prepare stage that makes {name.partition('/')[0]} (prepare_pretrain or prepare_midtrain), or correct the mixture",
        )
    return known[name]


def all_whole(data: Path, names: Iterable[str]) -> bool:
    """Whether these corpora or shards are in RUN/data with all their files. A task whose shards are not is to be done again."""
    try:
        return all(read_facts(data, name) is not None for name in names)
    except DataError:
        return False
