import json
import multiprocessing
import signal
import subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from glm.checkpoint.run_folder import RunFolder
from glm.data.batches import Batches
from glm.data.prepare import prepare
from glm.data.tokenized import open_corpus
from glm.errors import DataError, RecipeError
from glm.recipe.compose import load_run
from glm.recipe.midtrain import AgentCorpus, LongCorpus, ReasoningCorpus, RepositoryCorpus
from glm.recipe.sections import Source
from midtrain.prepare import main
from midtrain.tasks import names_of
from tests.midtrain.killed import endings
from tests.midtrain.test_contexts import RECORDS
from tests.midtrain.test_records import TOOLS, TRAJECTORY

TINY = Path(__file__).parents[2] / "configs/glm45/tiny.yaml"


@pytest.fixture(scope="module")
def stages():
    return load_run(TINY, ["data.problems=300"]).stages


@pytest.fixture
def run_folder(tmp_path, tokenizer_folder):
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    folder.tokenizer.symlink_to(tokenizer_folder)
    return folder


@pytest.fixture
def material(story, tmp_path):
    """A git repository with discussions, and records of every other kind."""
    (tmp_path / "discussions").mkdir()
    (tmp_path / "discussions" / "calculator.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    lines = [{"question": f"What is {i}+1?", "reasoning": f"One more than {i}.", "answer": str(i + 1)} for i in range(60)]
    lines.append({"question": "Unanswered", "answer": ""})
    (tmp_path / "reasoning.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "broken\n")
    (tmp_path / "long").mkdir()
    for i in range(8):
        (tmp_path / "long" / f"{i}.txt").write_text(f"The number {i} is said again. " * (5 + 20 * i))
    (tmp_path / "agents.jsonl").write_text("".join(json.dumps({"messages": TRAJECTORY, "tools": TOOLS}) + "\n" for _ in range(5)))
    return {
        "repositories": {"repositories": RepositoryCorpus(
            paths=(str(story.folder),), discussions=str(tmp_path / "discussions"), commits=10, document_tokens=500)},
        "reasoning": {"reasoning": ReasoningCorpus(paths=(str(tmp_path / "reasoning.jsonl"),), document_tokens=400, task_bytes=1500)},
        "long_documents": {"long": LongCorpus(paths=(str(tmp_path / "long"),), buckets={"long": 200, "longest": 1000})},
        "agents": {"agents": AgentCorpus(paths=(str(tmp_path / "agents.jsonl"),), document_tokens=1000)},
    }


def stage(stages, folder, material, **changes):
    return stages["prepare_midtrain"].model_copy(update={"run_folder": str(folder.root), "workers": 1, **material, **changes})


def texts(folder, tokenizer, name):
    entry = json.loads(folder.prepared.read_text())[name]
    corpus = open_corpus(folder.data, entry["corpus"])
    assert entry["documents"] == corpus.num_documents and entry["tokens"] == corpus.num_tokens
    return [tokenizer.decode(ids) for ids in documents_of(corpus)]


def documents_of(corpus):
    return [shard.tokens[first:end].tolist() for shard in corpus.shards for first, end in zip(shard.offsets, shard.offsets[1:])]


def test_every_kind_becomes_a_corpus_that_mixtures_can_name(stages, run_folder, material, tokenizer, capsys):
    main(stage(stages, run_folder, material))
    made = json.loads(run_folder.prepared.read_text())
    kinds = {name: {key.split("/")[1] for key in made if key.startswith(name + "/")} for name in ("repositories", "reasoning", "long", "agents")}
    assert kinds == {
        "repositories": {"files", "issues", "pull_requests", "commits", "all"}, "reasoning": {"all"}, "long": {"long", "longest", "all"},
        "agents": {"all"},
    }
    everything = texts(run_folder, tokenizer, "repositories/all")
    assert len(everything) == sum(made[f"repositories/{kind}"]["documents"] for kind in kinds["repositories"] - {"all"})
    assert sum(text.startswith("# repository: calculator") for text in everything) == 5
    user, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|user|>", "<|endoftext|>"))
    corpus = open_corpus(run_folder.data, made["repositories/all"]["corpus"])
    spelled = [shard.tokens for shard in corpus.shards]
    assert user not in np.concatenate(spelled) and "write <|user|> and <|endoftext|> here" in "".join(everything)
    assert (np.concatenate(spelled) == end).sum() >= len(everything) - len(corpus.shards)    # a held-out tail begins inside a document
    assert open_corpus(run_folder.data, made["agents/all"]["corpus"]).masked
    report = json.loads((run_folder.data / "prepare_midtrain_report.json").read_text())
    assert report["reasoning"]["read"]["records"] == 62 and report["reasoning"]["broken_records"] == 1
    assert report["reasoning"]["dropped"] == {"no question or no answer": 1}
    assert report["long"]["dropped"]["shorter than every bucket"] >= 1
    assert report["repositories"]["left_out"]["vendored"] == 2    # the file, and its part of the first commit
    assert report["repositories"]["read"]["control tokens spelled out, read as text"] == 2
    words = (run_folder.data / "prepare_midtrain_report.md").read_text()
    assert "### repositories/pull_requests: calculator, pull request 2" in words and "### agents/all" in words
    assert "prepare_midtrain: repositories: commits 1 documents" in capsys.readouterr().out


def test_any_number_of_workers_makes_the_same_bytes_and_a_second_run_makes_nothing(stages, run_folder, material, tmp_path, tokenizer_folder):
    other = RunFolder(tmp_path / "other")
    other.root.mkdir()
    other.tokenizer.symlink_to(tokenizer_folder)
    main(stage(stages, run_folder, material))
    main(stage(stages, other, material, workers=2))
    one, two = ({path.name: path.read_bytes() for path in folder.data.iterdir() if path.is_file()} for folder in (run_folder, other))
    assert one == two and len([name for name in one if name.endswith(".bin")]) > 8
    before = {path: path.stat().st_mtime_ns for path in run_folder.data.glob("*.bin")}
    lost = next(run_folder.data.glob("agents-all-*.bin"))
    lost.unlink()    # a task whose shard is not whole is done again
    main(stage(stages, run_folder, material))
    after = {path: path.stat().st_mtime_ns for path in run_folder.data.glob("*.bin")}
    assert {path for path in before if before[path] != after[path]} == {lost}


def made_files(folder: RunFolder) -> dict[str, bytes]:
    """What readers of the run folder's data see; drafts have hidden names."""
    return {str(path.relative_to(folder.data)): path.read_bytes() for path in folder.data.rglob("*")
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder.data).parts)}


def test_a_stage_killed_again_and_again_goes_on_to_the_same_bytes(stages, run_folder, material, tmp_path, tokenizer_folder):
    other = RunFolder(tmp_path / "other")
    other.root.mkdir()
    other.tokenizer.symlink_to(tokenizer_folder)
    main(stage(stages, other, material))
    moments = [1, 4, 30, 40]    # of some 110 renames; what a start finished the next has not to do
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as clean:
        assert clean.submit(endings, stage(stages, run_folder, material), moments).result() == [-signal.SIGKILL] * len(moments)
    finished = list(run_folder.data.glob("*-tasks/0*/facts.json"))
    assert finished and not run_folder.prepared.exists()
    main(stage(stages, run_folder, material))
    assert made_files(run_folder) == made_files(other)


def test_a_list_that_grew_makes_only_what_is_new(stages, run_folder, tmp_path, story, material):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text(f"{name} = 1\n" * 40)
    paths = (str(story.folder), str(tmp_path / "one"))
    corpus = RepositoryCorpus(paths=paths, repositories_per_task=1)
    none = {"reasoning": {}, "long_documents": {}, "agents": {}}
    main(stage(stages, run_folder, none, repositories={"r": corpus}))
    before = {path: path.stat().st_mtime_ns for path in run_folder.data.glob("r-files-*.bin")}
    main(stage(stages, run_folder, none, repositories={"r": corpus.model_copy(update={"paths": (*paths, str(tmp_path / "two"))})}))
    after = {path: path.stat().st_mtime_ns for path in run_folder.data.glob("r-files-*.bin")}
    assert before.items() < after.items() and len(after) == 3
    story.commit("more", {"more.py": "more = 1\n"})
    main(stage(stages, run_folder, none, repositories={"r": corpus}))
    assert len(list(run_folder.data.glob("r-files-*.bin"))) == 4    # only the repository that has a new commit


def test_what_cannot_be_read_is_told_before_anything_is_made(stages, run_folder, tmp_path, material):
    (tmp_path / "plain").mkdir()
    subprocess.run(["git", "init", "-q", str(tmp_path / "fresh")], check=True)
    wrong = RepositoryCorpus(paths=tuple(str(tmp_path / name) for name in ("plain", "fresh", "calculator")), commits=1)
    with pytest.raises(DataError, match="plain folder(.|\n)*2 of 3 repositories will not do(.|\n)*fresh"):
        main(stage(stages, run_folder, material, repositories={"repositories": wrong}))
    assert not list(run_folder.data.glob("*"))
    calculator = wrong.model_copy(update={"paths": (str(tmp_path / "calculator"),), "discussions": str(tmp_path / "plain")})
    with pytest.raises(DataError, match="repositories.repositories.discussions(.|\n)*without a file for any of 1(.|\n)*calculator.jsonl"):
        main(stage(stages, run_folder, material, repositories={"repositories": calculator}))
    with pytest.raises(DataError, match="corpus reasoning(.|\n)*1 records that cannot be read(.|\n)*at most 0"):
        main(stage(stages, run_folder, material, broken_limit=0))
    with pytest.raises(RecipeError, match="corpora of different names, not repositories twice"):
        load_run(TINY, ["prepare_midtrain.agents.repositories.paths=[x]"])
    with pytest.raises(RecipeError, match="unknown key `repositories.repositories.path`"):
        load_run(TINY, ["prepare_midtrain.repositories.repositories.path=[x]"])


def test_repositories_of_one_name_are_told_apart():
    folders = [Path("/data/a/core"), Path("/data/b/core.git"), Path("/data/c/other")]
    assert list(names_of(folders)) == ["a/core", "b/core", "other"]


@pytest.fixture
def packed(stages, run_folder, material):
    """Rows of a mid-training stage made of real documents, and the whole documents they came from."""
    main(stage(stages, run_folder, material))
    sources = {name: Source(corpus=f"{name}/all", share=0.25) for name in ("repositories", "reasoning", "long", "agents")}
    recipe = stages["midtrain_repo_code"]
    recipe = recipe.model_copy(update={
        "sequence_length": 512, "tokens": 4096, "run_folder": str(run_folder.root), "data": recipe.data.model_copy(update={"sources": sources})})
    prepare(recipe, run_folder)
    return recipe, Batches(recipe, run_folder)


def test_documents_arrive_whole_in_the_rows_of_a_stage(packed, run_folder):
    recipe, batches = packed
    rows = batches.rows(0, 16)
    made = json.loads(run_folder.prepared.read_text())
    whole: dict[str, set[tuple]] = {}
    for name in ("repositories", "reasoning", "agents"):
        corpus = open_corpus(run_folder.data, made[f"{name}/all"]["corpus"])
        whole[name] = set(map(tuple, documents_of(corpus)))
    seen = 0
    for row in rows:
        start = 0
        for length in row.document_lengths:
            if row.source in whole:
                assert tuple(row.token_ids[start : start + length].tolist()) in whole[row.source]
                seen += 1
            assert row.loss_mask[start : start + length].tolist() == [1.0] * (length - 1) + [0.0]    # all tokens, an agent's tools too
            start += length
    assert seen > 20


@pytest.fixture(scope="module")
def model(stages):
    from tests.model_fixture import megatron_model

    return megatron_model(stages["midtrain_repo_code"].model)


def outcome(model, batch):
    """(losses of the trunk [T], sum of the MTP losses)"""
    model.mtp_weight = 0.3
    losses = model(
        input_ids=batch.token_ids, position_ids=batch.position_ids, attention_mask=None, labels=batch.labels,
        loss_mask=batch.loss_mask, packed_seq_params=batch.documents,
    )
    return (losses * batch.loss_mask).detach()[0], model.take_mtp_loss()[0].item()


def test_a_packed_row_of_real_documents_gives_every_token_what_it_has_alone(packed, model):
    """Positions, MTP targets and, on a real model, the losses of trunk and MTP layer; told as one document they differ."""
    from glm.train.batch import packed_batch

    _, batches = packed
    rows = [row for row in batches.rows(0, 24) if len(row.document_lengths) > 3]
    row = max(rows, key=lambda row: len(row.document_lengths))
    parts = [torch.as_tensor(getattr(row, name)) for name in ("token_ids", "labels", "loss_mask")]
    lengths, device = list(row.document_lengths), torch.device("cpu")
    batch = packed_batch(*([part] for part in parts), lengths, device)
    losses, ahead = outcome(model, batch)
    start, ahead_alone = 0, 0.0
    for length in lengths:
        here = slice(start, start + length)
        alone = packed_batch(*([part[here]] for part in parts), [length], device)
        for name in ("mtp_token_ids", "mtp_labels", "mtp_mask"):
            assert torch.equal(getattr(batch.documents, name)[0, here], getattr(alone.documents, name)[0]), name
        assert batch.position_ids[0, here].tolist() == list(range(length))
        its_losses, its_ahead = outcome(model, alone)
        assert torch.allclose(losses[here], its_losses, atol=2e-5)
        start, ahead_alone = start + length, ahead_alone + its_ahead
    assert ahead == pytest.approx(ahead_alone, rel=1e-5)
    as_one = packed_batch(*([part] for part in parts), [sum(lengths)], device)
    assert (outcome(model, as_one)[0][lengths[0]:] - losses[lengths[0]:]).abs().max() > 1e-3


def test_the_users_own_text_stands_for_the_installation(stages, run_folder, tmp_path, tokenizer):
    (tmp_path / "mine").mkdir()
    for i in range(4):
        (tmp_path / "mine" / f"{i}.txt").write_text(f"My {i}th story. " * 30)
    recipe = stages["prepare_midtrain"]
    recipe = recipe.model_copy(update={
        "run_folder": str(run_folder.root), "workers": 1, "data": recipe.data.model_copy(update={"documents": str(tmp_path / "mine")})})
    main(recipe)
    told = "".join(texts(run_folder, tokenizer, "repositories/all"))
    assert all(f"My {i}th story." in told for i in range(4)) and "# repository" not in told
    assert len(texts(run_folder, tokenizer, "reasoning/all")) == 300
