"""From the corpora of the recipe to tasks: names and JSON values from which a worker makes documents, wherever it runs."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from glm.data.python_corpus import package_folders
from glm.errors import DataError, UserError
from glm.recipe.midtrain import AgentCorpus, LongCorpus, ReasoningCorpus, RepositoryCorpus
from glm.recipe.raw import RawData
from midtrain.checkout import Checkout, open_checkout
from midtrain.records import PROBLEMS, Piece, expand, pieces

INSTALLED = "python"
OPENED_AT_ONCE = 16
FEWEST_TO_HOLD_OUT_WHOLE = 200
"""Of so many repositories some are held out whole; of fewer single documents are."""
KINDS = {RepositoryCorpus: "repositories", ReasoningCorpus: "reasoning", LongCorpus: "long_documents", AgentCorpus: "agents"}


Corpus = RepositoryCorpus | ReasoningCorpus | LongCorpus | AgentCorpus


def tasks_of(name: str, corpus: Corpus, data: RawData, seed: int) -> dict[str, dict]:
    """Task name -> what it works on, in order. Raises DataError for a path or repository that cannot be read."""
    if data.documents is not None and corpus.paths[0].split(":")[0] == INSTALLED:    # the user's own text, each document whole
        corpus = LongCorpus(paths=(data.documents,), buckets={"files": 1})
    kind = KINDS[type(corpus)]
    how_it_is_cut = {"paths", "discussions", "task_bytes", "repositories_per_task"}
    options = {"kind": kind, "corpus": name, "options": corpus.model_dump(mode="json", exclude=how_it_is_cut), "seed": seed}
    asked_at = f"{kind}.{name}.paths"
    if kind == "repositories":
        parts = list(_repositories(asked_at, corpus))
    elif corpus.paths == (PROBLEMS,):
        parts = [{"piece": Piece(PROBLEMS, 0, data.problems, "").as_input()}]
    else:
        parts = [{"piece": piece.as_input()} for piece in pieces(corpus.paths, asked_at, corpus.task_bytes)]
    return {f"{number:06}": options | part for number, part in enumerate(parts)}


def _repositories(asked_at: str, corpus: RepositoryCorpus) -> Iterator[dict]:
    folders: list[Path] = []
    for given in corpus.paths:
        folders += _installed(given, asked_at) if given.split(":")[0] == INSTALLED else expand((given,), asked_at)
    checkouts = _distinct(_opened(names_of(folders), corpus.needs_history))
    if corpus.discussions is not None and not any(_discussions_of(checkout, corpus.discussions).is_file() for checkout in checkouts):
        raise DataError(
            asked_at.removesuffix("paths") + "discussions", f"{corpus.discussions}, without a file for any of {len(checkouts)} repositories",
            f"a folder with NAME.jsonl, such as {_discussions_of(checkouts[0], corpus.discussions).name}", "correct the path, or leave it out",
        )
    for first in range(0, len(checkouts), corpus.repositories_per_task):
        some = checkouts[first : first + corpus.repositories_per_task]
        yield {
            "repositories": [_described(checkout, corpus.discussions) for checkout in some],
            "hold_out_whole": len(checkouts) >= FEWEST_TO_HOLD_OUT_WHOLE,
        }


def _installed(given: str, asked_at: str) -> list[Path]:
    """``python``: all packages of the standard library; ``python:json``: one."""
    folders, name = package_folders(), given.partition(":")[2]
    chosen = [folder for folder in folders if not name or folder.name == name]
    if not chosen:
        known = ", ".join(folder.name for folder in folders)
        raise DataError(asked_at, f"no package {name} in the Python installation", f"one of {known}", "correct the name")
    return chosen


def names_of(folders: list[Path]) -> dict[str, Path]:
    """Each folder under its own name; where several share it, with as many of the folders above as tell them apart."""
    folders = list(dict.fromkeys(folders))
    depth = dict.fromkeys(folders, 1)
    while True:
        names = {folder: "/".join(folder.parts[-depth[folder] :]).removesuffix(".git") for folder in folders}
        count = Counter(names.values())
        shared = [folder for folder in folders if count[names[folder]] > 1 and depth[folder] < len(folder.parts)]
        if not shared:
            return {names[folder]: folder for folder in folders}
        for folder in shared:
            depth[folder] += 1


def _opened(folders: dict[str, Path], history: bool) -> list[Checkout]:
    """All are looked at before the work begins. Raises DataError for the first that will not do, and says how many do not."""
    def opened(entry: tuple[str, Path]) -> Checkout | UserError:
        try:
            return open_checkout(*entry, history=history)
        except UserError as error:
            return error

    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:    # git does the work
        found = list(pool.map(opened, folders.items()))
    wrong = [one for one in found if isinstance(one, UserError)]
    if len(wrong) > 1:
        where = ", ".join(error.where for error in wrong[1:4]) + (" …" if len(wrong) > 4 else "")
        raise DataError(wrong[0].where, f"{wrong[0].found} ({len(wrong)} of {len(found)} repositories will not do, also {where})",
                        wrong[0].expected, wrong[0].todo) from wrong[0]
    if wrong:
        raise wrong[0]
    return found


def _distinct(checkouts: list[Checkout]) -> list[Checkout]:
    """The same commit twice is one repository in two places."""
    first_of: dict[str, Checkout] = {}
    for checkout in checkouts:
        first_of.setdefault(checkout.commit or checkout.path, checkout)
    if len(first_of) < len(checkouts):
        print(f"{len(checkouts) - len(first_of)} repositories left out: another one has the same commit", flush=True)
    return list(first_of.values())


def _described(checkout: Checkout, discussions: str | None) -> dict:
    """JSON values that change when the documents may have."""
    told = {}
    if discussions is not None and (path := _discussions_of(checkout, discussions)).is_file():
        status = path.stat()
        told = {"discussions": str(path), "of": f"{status.st_size} {status.st_mtime_ns}"}
    return asdict(checkout) | told | ({} if checkout.commit else {"identity": _folder_identity(checkout.path)})


def _discussions_of(checkout: Checkout, discussions: str) -> Path:
    return Path(discussions).expanduser().absolute() / f"{checkout.name}.jsonl"


def _folder_identity(path: str) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(names):
            status = os.lstat(os.path.join(folder, name))
            digest.update(os.fsencode(f"{folder}/{name} {status.st_size} {status.st_mtime_ns}\n"))
    return digest.hexdigest()
