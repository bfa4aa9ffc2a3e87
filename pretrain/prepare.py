"""Stage ``pretrain.prepare``: raw sources to tokenized corpora by source and quality bucket, named SOURCE/BUCKET in mixtures.

    read, clean, language, score, signatures    a task for each piece of a source       reading.py
    exact duplicates                            a task for each part of the hash range  duplicates.py
    near duplicates                             a task for each band                    duplicates.py
    quality edges, who is below them            one task                                buckets.py
    semantic duplicates                         a task for each piece, then clusters    semantic.py
    fill-in-the-middle, tokens, shards          a task for each piece                   writing.py

Everything is a task of ``glm.data.tasks``: killed and run again, it goes on where it was; with any number of workers or ranks
the corpora have the same bytes. Results between the steps lie in RUN/data/prepare-DIGEST and are removed at the end.
"""

import hashlib
import json
import shutil
import time
import uuid
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from glm.checkpoint.run_folder import RunFolder, write_json
from glm.data.prepared import all_whole, prepared_corpora
from glm.data.tasks import FACTS, POLL_SECONDS, run_tasks, worker_pool
from glm.data.tokenized import read_facts, write_shard_list
from glm.errors import DataError
from glm.platform.ranks import Place, place
from glm.recipe.raw import RawSource
from glm.recipe.schema import PrepareRecipe
from glm.tokenizer.load import digest_of, load_tokenizer, token_id
from glm.tokenizer.special_tokens import CODE_MIDDLE, CODE_PREFIX, CODE_SUFFIX
from pretrain import duplicates, semantic
from pretrain.buckets import quality_task
from pretrain.language import check_languages
from pretrain.readers import pieces
from pretrain.reading import LIST, Readings, list_task, read_task, too_many_broken
from pretrain.report import report
from pretrain.scorers import import_plugins, judged_by, make_scorer
from pretrain.signatures import bands_and_rows
from pretrain.writing import write_task

FORMAT = "3"
"""Raised when the same inputs give other corpora."""


def main(recipe: PrepareRecipe) -> None:
    """Raises DataError for what cannot be read, RecipeError for a scorer, embedder or plug-in that is not there."""
    folder, here = RunFolder.of(recipe), place()
    _refuse_what_cannot_work(recipe)
    preparation = Preparation.of(recipe, folder)
    if here.rank == 0:
        for left_by_a_killed_process in folder.data.glob(".prepare-*.tmp"):
            shutil.rmtree(left_by_a_killed_process, ignore_errors=True)
    if not preparation.registered():
        with worker_pool(recipe.workers) as pool:
            facts = preparation.run(pool)
        if here.rank == 0:
            register(preparation, facts)
    give_up(preparation.work, here)


def give_up(work: Path, here: Place) -> None:
    """Removes the folder when every rank has come here, which is the last that wants anything of it.

    Rank 0 asks with a word of its own and the others repeat it: what a killed launch asked or answered counts for nothing.
    The folder goes under a hidden name, whole: a rank finds all of it or none.
    """
    asked, answers, answered = work / "asked.json", [work / f"answer-{rank}.json" for rank in range(here.world_size)], None
    if here.rank == 0 and work.is_dir():
        word = uuid.uuid4().hex
        write_json(asked, word)
        while any(_word(answer) != word for answer in answers[1:]):
            time.sleep(POLL_SECONDS)
        shutil.rmtree(work.replace(work.with_name(f".{work.name}.tmp")))
    while here.rank and work.is_dir():
        if (word := _word(asked)) not in (None, answered):
            write_json(answers[here.rank], answered := word)
        time.sleep(POLL_SECONDS)


def _word(path: Path) -> str | None:
    with suppress(FileNotFoundError):
        return json.loads(path.read_text(encoding="utf-8"))


def _refuse_what_cannot_work(recipe: PrepareRecipe) -> None:
    import_plugins(recipe.plugins)
    for source in recipe.sources.values():
        if source.quality:
            make_scorer(source.quality)
        if source.language:
            check_languages(source.language)
    if recipe.semantic:
        semantic.make_embedder(recipe.semantic.embedder)


def raw_sources(recipe: PrepareRecipe) -> tuple[dict[str, RawSource], dict[str, str]]:
    """(source -> what is read, source -> the source whose documents stand for its own).

    The user's own text (``data.documents``) stands for every corpus of the installation, is read once, and is not judged: it has
    one bucket, which stands for all.
    """
    named = {name: recipe.sources[name] for name in recipe.order}
    own = [name for name, source in named.items() if source.path is None and not source.load_dataset]
    if recipe.data.documents is None or not own:
        return named, {}
    text = RawSource(path=recipe.data.documents)
    sources = {name: text if name == own[0] else source for name, source in named.items() if name not in own[1:]}
    return sources, {name: own[0] for name in own}


@dataclass(frozen=True)
class Preparation:
    """One run of the stage: what is read, by which rules, and where the results between the steps lie."""

    recipe: PrepareRecipe
    folder: RunFolder
    sources: dict[str, RawSource]
    stands_for: dict[str, str]
    tasks: dict[str, dict]
    """Reading task -> its input."""
    owners: tuple[str, ...]
    """Source of each reading task."""
    digest: str
    tokenizer: str
    """Its digest."""
    vocab_size: int
    control_ids: dict[str, int]
    """Of the tokens of fill-in-the-middle."""

    @classmethod
    def of(cls, recipe: PrepareRecipe, folder: RunFolder) -> "Preparation":
        loaded = load_tokenizer(folder.tokenizer)
        sources, stands_for = raw_sources(recipe)
        rules = {
            "deduplicate": recipe.deduplicate.model_dump(mode="json"), "shortest_characters": recipe.shortest_characters,
            "broken_limit": recipe.broken_limit, "plugins": list(recipe.plugins),
        }
        tasks, owners = {}, []
        for name, source in sources.items():
            for number, piece in enumerate(pieces(name, source, recipe.task_bytes, recipe.data.problems, recipe.seed)):
                tasks[f"{name}-{number:05d}"] = {"source": source.model_dump(mode="json"), "piece": piece.as_input(), **rules}
                owners.append(name)
        tokenizer = digest_of(folder.tokenizer)
        semantic_rules = recipe.semantic.model_dump(mode="json") if recipe.semantic else None
        judged = judged_by(recipe.plugins, [source.quality for source in sources.values() if source.quality])
        everything = json.dumps([FORMAT, tokenizer, recipe.seed, semantic_rules, list(sources), judged, tasks], sort_keys=True)
        digest = hashlib.blake2b(everything.encode(), digest_size=6).hexdigest()
        control_ids = {token: token_id(loaded, token) for token in (CODE_PREFIX, CODE_MIDDLE, CODE_SUFFIX)}
        return cls(recipe, folder, sources, stands_for, tasks, tuple(owners), digest, tokenizer, len(loaded), control_ids)

    @property
    def work(self) -> Path:
        return self.folder.data / f"prepare-{self.digest}"

    def corpus(self, source: str, bucket: str) -> str:
        """File name of a corpus."""
        return f"{source}-{bucket}-{self.digest}"

    def registered(self) -> bool:
        """Whether a start before this one got as far as the registry, which it wrote last, and the corpora are there."""
        mine = {entry.corpus for name, entry in prepared_corpora(self.folder).items() if name.partition("/")[0] in self.recipe.sources}
        return bool(mine) and all(corpus.endswith(f"-{self.digest}") for corpus in mine) and all_whole(self.folder.data, mine)

    def run(self, pool: Executor | None) -> dict:
        """Facts of every step."""
        read = run_tasks(self.work / "read", self.tasks, read_task, pool, label="read")
        self._refuse_broken(read)
        readings = Readings(self.work / "read", tuple(read), tuple(facts["kept"] for facts in read.values()), self.owners)
        digest = run_tasks(self.work / "readings", {"list": readings.as_json()}, list_task, label="readings")["list"]["digest"]
        listed = {"file": str(self.work / "readings" / "list" / LIST), "digest": digest}
        steps: list[tuple[str, Path]] = []
        for reason, step in (("exact", self._exact), ("near", self._near), ("quality", self._quality), ("semantic", self._semantic)):
            given = {"readings": listed, "alive": str(steps[-1][1]) if steps else None}
            after = step(readings, given, pool)
            if after is not None:
                steps.append((reason, after))
        quality = json.loads((self.work / "quality" / "edges" / FACTS).read_text(encoding="utf-8"))["facts"]
        written = self._write(readings, listed, quality, steps, pool)
        return {"read": read, "quality": quality, "steps": steps, "readings": readings, "written": written}

    def _refuse_broken(self, read: dict[str, dict]) -> None:
        """Raises DataError if the tasks of one source together met more broken records than the recipe allows."""
        for name in self.sources:
            facts = [read[task] for task, owner in zip(read, self.owners) if owner == name]
            if sum(one["documents"].get("broken", 0) for one in facts) > self.recipe.broken_limit:
                where, _, found = [sample["text"] for one in facts for sample in one["samples"].get("broken", [])][-1].partition(": ")
                last = DataError(where, found, "records that can be read", "correct or remove them")
                raise too_many_broken(last, self.recipe.broken_limit)

    def _exact(self, readings: Readings, given: dict, pool: Executor | None) -> Path | None:
        if not self.recipe.deduplicate.exact:
            return None
        parts = duplicates.parts_of(readings.documents)
        tasks = {f"part-{part}": given | {"part": part, "parts": parts} for part in range(parts)}
        return self._resolved("exact", tasks, duplicates.exact_task, given, pool)

    def _near(self, readings: Readings, given: dict, pool: Executor | None) -> Path | None:
        deduplicate = self.recipe.deduplicate
        if not deduplicate.near:
            return None
        parts, (bands, _) = duplicates.parts_of(readings.documents), bands_and_rows(deduplicate)
        tasks = {
            f"band-{band}-{part}": given | {"band": band, "part": part, "parts": parts, "deduplicate": deduplicate.model_dump(mode="json")}
            for band in range(bands) for part in range(parts)
        }
        return self._resolved("near", tasks, duplicates.near_task, given, pool)

    def _quality(self, readings: Readings, given: dict, pool: Executor | None) -> Path:
        rules = {name: source.quality and source.quality.model_dump(mode="json") for name, source in self.sources.items()}
        run_tasks(self.work / "quality", {"edges": given | {"quality": rules}}, quality_task, pool, label="quality")
        return self.work / "quality" / "edges" / "alive.npy"

    def _resolved(self, step: str, tasks: dict[str, dict], work, given: dict, pool: Executor | None) -> Path:
        run_tasks(self.work / step, tasks, work, pool, label=f"{step} duplicates")
        pairs = {"pairs": [str(self.work / step / name / "pairs.npy") for name in tasks]}
        run_tasks(self.work / step, {"resolved": given | pairs}, duplicates.resolve_task, pool, label=f"{step} duplicates")
        return self.work / step / "resolved" / "alive.npy"

    def _semantic(self, readings: Readings, given: dict, pool: Executor | None) -> Path | None:
        rules, place_of = self.recipe.semantic, self.work / "semantic"
        numbers = semantic.tasks_of(readings, rules) if rules else []
        if not numbers:
            return None
        given = given | {"semantic": rules.model_dump(mode="json"), "plugins": list(self.recipe.plugins), "seed": self.recipe.seed}
        fitted = run_tasks(place_of, {"fit": given}, semantic.fit_task, pool, label="embedder")["fit"]
        tasks = {
            f"embed-{readings.names[number]}": given | {"task": number, "fitted": str(place_of / "fit" / "fitted.npz")} for number in numbers
        }
        run_tasks(place_of, tasks, semantic.embed_task, pool, label="embeddings")
        given |= {"embedded": [str(place_of / name) for name in tasks], "threshold": rules.threshold}
        at_once = -(-fitted["clusters"] // 256)
        tasks = {
            f"clusters-{first}": given | {"first": first, "last": min(first + at_once, fitted["clusters"])}
            for first in range(0, fitted["clusters"], at_once)
        }
        run_tasks(place_of, tasks, semantic.compare_task, pool, label="semantic duplicates")
        dropped = {"dropped": [str(place_of / name / "dropped.npy") for name in tasks]}
        run_tasks(place_of, {"resolved": given | dropped}, duplicates.drop_task, pool, label="semantic duplicates")
        return place_of / "resolved" / "alive.npy"

    def _write(self, readings: Readings, listed: dict, quality: dict[str, dict], steps: list, pool: Executor | None) -> dict[str, dict]:
        tasks = {}
        for number, (name, owner) in enumerate(zip(readings.names, readings.sources)):
            edges = quality[owner]["edges"]
            shards = {bucket: shard_name(self.corpus(owner, bucket), name) for bucket, _ in edges}
            tasks[name] = {
                "readings": listed, "task": number, "name": owner, "source": self.sources[owner].model_dump(mode="json"),
                "edges": edges,
                "steps": [(reason, str(path)) for reason, path in steps], "seed": self.recipe.seed, "data": str(self.folder.data),
                "shards": shards, "tokenizer": str(self.folder.tokenizer), "tokenizer_digest": self.tokenizer,
                "vocab_size": self.vocab_size, "control_ids": self.control_ids,
            }
        return run_tasks(self.work / "write", tasks, write_task, pool, label="tokenize", intact=partial(_shards_whole, self.folder.data))


def shard_name(corpus: str, task: str) -> str:
    """Of a corpus, what one reading task gave to it."""
    return f"{corpus}-{task.rpartition('-')[2]}"


def _shards_whole(data: Path, facts: dict) -> bool:
    return all_whole(data, (part["shard"] for part in facts["written"].values()))


def register(preparation: Preparation, facts: dict) -> None:
    """Joins the shards into corpora, enters them in RUN/data/prepared.json, writes and prints the report.

    A bucket of few documents, all of which fell to validation, is no corpus to train on: it is told and left out of the registry.
    Raises DataError if that leaves no corpus at all.
    """
    folder, made = preparation.folder, {}
    nothing_to_train_on = []
    for source in preparation.sources:
        for bucket, _ in reversed(facts["quality"][source]["edges"]):
            parts = [
                task["written"][bucket]
                for task, owner in zip(facts["written"].values(), preparation.owners) if owner == source and bucket in task["written"]
            ]
            shards = [part["shard"] for part in parts]
            if all(shard["held_out_documents"] == shard["documents"] for shard in (read_facts(folder.data, shard) for shard in shards)):
                nothing_to_train_on += [f"{source}/{bucket}"] if parts else []
            else:
                name = preparation.corpus(source, bucket)
                write_shard_list(folder.data, name, shards, {"tokenizer": preparation.tokenizer})
                made[source, bucket] = {"corpus": name} | {key: sum(part[key] for part in parts) for key in ("documents", "tokens")}
    if nothing_to_train_on:
        where, found = ", ".join(nothing_to_train_on), "only documents that fell to validation, one in fifty does"
        if not made:
            raise DataError(where, found, "something to train on", "give more text")
        print(f"{preparation.recipe.stage}: {where}: {found}; no mixture can name it", flush=True)
    entries = {f"{source}/{bucket}": entry for (source, bucket), entry in made.items()}
    for source, stand_in in preparation.stands_for.items():
        for bucket in preparation.recipe.sources[source].buckets:
            if (stand_in, "all") in made:
                entries[f"{source}/{bucket}"] = made[stand_in, "all"]
    before = json.loads(folder.prepared.read_text(encoding="utf-8")) if folder.prepared.is_file() else {}
    others = {name: entry for name, entry in before.items() if name.partition("/")[0] not in preparation.recipe.sources}
    report(preparation.recipe.stage, folder.data, tuple(preparation.sources), preparation.owners, facts)
    write_json(folder.prepared, others | entries)
