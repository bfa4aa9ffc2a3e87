"""Stage ``midtrain.prepare``: repositories, reasoning, long texts and agents' trajectories to corpora, named NAME/KIND in mixtures.

    repositories    NAME/files, NAME/issues, NAME/pull_requests, NAME/commits
    long_documents  NAME/BUCKET for each bucket of the recipe
    and of every corpus NAME/all

Each task (a few repositories, a piece of a file of records) makes its documents and writes them as shards into RUN/data; facts of
finished tasks lie in RUN/data/NAME-tasks. Killed and run again, or with more paths, only what is not there is made.
"""

import hashlib
import json
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

from glm.checkpoint.run_folder import RunFolder, write_json
from glm.data.prepared import all_whole
from glm.data.tasks import run_tasks, worker_pool
from glm.data.tokenized import read_facts, write_shard_list
from glm.errors import DataError
from glm.platform.ranks import place
from glm.recipe.schema import MidtrainPrepareRecipe
from glm.tokenizer.load import digest_of, load_tokenizer
from midtrain.report import report
from midtrain.tasks import tasks_of
from midtrain.work import FORMAT, do_task

ALL = "all"


def main(recipe: MidtrainPrepareRecipe) -> None:
    """Raises DataError for a path, repository or record that cannot be read, PlatformError without git."""
    folder = RunFolder.of(recipe)
    load_tokenizer(folder.tokenizer)
    made_with = {"format": FORMAT, "tokenizer": digest_of(folder.tokenizer)}
    tasks = {
        name: {task: given | made_with for task, given in tasks_of(name, corpus, recipe.data, recipe.seed).items()}
        for name, corpus in recipe.corpora.items()
    }    # all paths are looked at before the first document is made
    with worker_pool(recipe.workers) as pool:
        facts = {name: make(folder, name, given, pool, recipe.broken_limit) for name, given in tasks.items()}
    if place().rank == 0:
        register(folder, facts, made_with["tokenizer"])
        report(recipe.stage, folder.data, facts)


def make(folder: RunFolder, name: str, tasks: dict[str, dict], pool: Executor | None, broken_limit: int) -> list[dict]:
    """Facts of the tasks of one corpus, in order. Raises DataError for too many broken records."""
    work = folder.data / f"{name}-tasks"
    do, intact = partial(do_task, folder.data, folder.tokenizer), partial(_shards_whole, folder.data)
    facts = list(run_tasks(work, tasks, do, pool, label=name, intact=intact).values())
    broken = sum(one["broken"] for one in facts)
    if broken > broken_limit:
        first = next(words for one in facts for words in one["first_broken"])
        raise DataError(
            f"corpus {name}", f"{broken} records that cannot be read, the first:\n            {first}",
            f"at most {broken_limit} (broken_limit)",
            "correct or remove them, or raise broken_limit",
        )
    return facts


def _shards_whole(data: Path, facts: dict) -> bool:
    return all_whole(data, (shard["name"] for shard in facts["shards"].values()))


def register(folder: RunFolder, facts: dict[str, list[dict]], tokenizer: str) -> None:
    """Joins the shards of each bucket and of all into corpora, and enters them in RUN/data/prepared.json."""
    entries: dict[str, dict] = {}
    for name, tasks in facts.items():
        buckets: dict[str, list[str]] = {}
        for task in tasks:
            for bucket, shard in task["shards"].items():
                buckets.setdefault(bucket, []).append(shard["name"])
        together = [shard for bucket in sorted(buckets) for shard in buckets[bucket]]
        if not together:
            found, todo = f"no document in {len(tasks)} tasks", f"see what was left out: {folder.data / f'{name}-tasks'}"
            raise DataError(f"corpus {name}", found, "something to train on", todo)
        for bucket, shards in [*sorted((bucket, shards) for bucket, shards in buckets.items() if bucket != ALL), (ALL, together)]:
            entries[f"{name}/{bucket}"] = _corpus(folder.data, name, bucket, shards, tokenizer)
    before = json.loads(folder.prepared.read_text(encoding="utf-8")) if folder.prepared.is_file() else {}
    others = {name: entry for name, entry in before.items() if name.partition("/")[0] not in facts}
    write_json(folder.prepared, others | entries)


def _corpus(data: Path, name: str, bucket: str, shards: list[str], tokenizer: str) -> dict:
    corpus = f"{name}-{bucket}-{hashlib.blake2b(json.dumps(shards).encode(), digest_size=6).hexdigest()}"
    write_shard_list(data, corpus, shards, {"tokenizer": tokenizer})
    written = read_facts(data, corpus)
    return {"corpus": corpus, "documents": written["documents"], "tokens": written["tokens"]}
