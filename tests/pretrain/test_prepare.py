"""The prepare stage from made-up raw text to corpora: what is planted is found, and the bytes depend on nothing but the input."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from glm.checkpoint.run_folder import RunFolder, write_json
from glm.data.prepared import prepared_corpora
from glm.data.tokenized import HELD_OUT_MODULUS, open_corpus, text_key
from glm.errors import DataError
from glm.platform.ranks import Place
from glm.recipe.saved import dump_recipe
from glm.recipe.schema import PrepareRecipe
from glm.tokenizer.load import load_tokenizer, token_id
from glm.tokenizer.special_tokens import CODE_MIDDLE, CODE_PREFIX, CODE_SUFFIX, CONTROL_TOKENS, END_OF_TEXT
from pretrain import prepare, scorers
from pretrain.prepare import give_up, main, shard_name
from tests.pretrain.conftest import recipe_on, source, write_jsonl
from tests.pretrain.planted import GERMAN, SPAM, essay, nearly, program, templated

QUALITY = {"scorer": "heuristics", "by": "score", "buckets": {"high": 0.5, "low": 0.2}}
ONCE = range(60)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Two sources of prose with duplicates within and across them, German, spam and broken records; one of programs."""
    folder = tmp_path_factory.mktemp("raw")
    web = [essay(number) for number in ONCE]
    web += [essay(3), essay(4).upper() + "  \n", nearly(essay(5), 100), nearly(essay(6), 101)]
    web += [GERMAN, GERMAN * 2, SPAM, "", "too short", essay(500) + " <|user|> says <|endoftext|> " + essay(501)]
    books = [essay(number) for number in range(200, 230)] + [essay(7), nearly(essay(8), 102)]
    path = write_jsonl(folder / "web" / "a.jsonl", web)
    path.write_text(path.read_text() + '{"text": 3}\n{"txt": "no such key"}\nnot json\n')
    write_jsonl(folder / "books" / "b.jsonl", books)
    write_jsonl(folder / "code" / "c.jsonl", [program(number) for number in range(300)])
    return folder


def sources_of(raw: Path) -> dict:
    judged = {"language": {"keep": ["en"], "among": ["en", "de", "fr", "zh"]}, "quality": QUALITY}
    return {
        "web": source(path=str(raw / "web"), **judged), "books": source(path=str(raw / "books"), **judged),
        "code": source(path=str(raw / "code"), fim={"rate": 0.5, "suffix_first": 0.5}),
    }


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory, request):
    """The three sources prepared by one worker, undisturbed."""
    folder = tmp_path_factory.mktemp("prepared") / "run"
    main(make_module_recipe(request)(folder, sources_of(raw)))
    return RunFolder(folder)


def make_module_recipe(request):
    return partial(recipe_on, request.getfixturevalue("tiny_prepare"), request.getfixturevalue("tokenizer_folder"))


def report_of(folder: RunFolder) -> dict:
    return json.loads((folder.data / "prepare_report.json").read_text())


def texts_of(folder: RunFolder, name: str) -> list[str]:
    """All documents of a prepared corpus, decoded, in order. (One may be kept in two pieces, its tail held out.)"""
    tokenizer, corpus = load_tokenizer(folder.tokenizer), open_corpus(folder.data, prepared_corpora(folder)[name].corpus)
    found = np.concatenate([shard.tokens for shard in corpus.shards])
    ends = np.flatnonzero(found == token_id(tokenizer, END_OF_TEXT)) + 1
    return [tokenizer.decode(found[first:end]) for first, end in zip([0, *ends], ends)]


def corpora(folder: RunFolder) -> dict[str, bytes]:
    """Everything that decides what later stages read, and the report."""
    return {path.name: path.read_bytes() for path in sorted(folder.data.iterdir()) if path.is_file()}


def test_what_was_planted_is_dropped_and_counted(prepared):
    web, books = (report_of(prepared)["sources"][name] for name in ("web", "books"))
    dropped = {reason: count["documents"] for reason, count in web["dropped"].items()}
    assert dropped == {"empty": 1, "short": 1, "language": 2, "exact": 2, "near": 2, "quality": 1}
    assert web["broken_records"] == 3 and web["documents_read"] == 70
    assert {reason: count["documents"] for reason, count in books["dropped"].items()} == {"exact": 1, "near": 1}
    kept = [text for bucket in ("high", "low") if f"web/{bucket}" in prepared_corpora(prepared) for text in texts_of(prepared, f"web/{bucket}")]
    assert len(kept) == 61 == sum(bucket["documents"] for bucket in web["buckets"].values())
    assert {essay(number) + END_OF_TEXT for number in ONCE} <= set(kept)


def test_of_two_sources_the_first_named_keeps_a_document(prepared):
    kept = "".join(texts_of(prepared, "web/high"))
    books = "".join(texts_of(prepared, "books/high"))
    assert essay(7) in kept and essay(7) not in books and essay(8) in kept and "number 102 meant" not in books


def test_the_report_shows_samples_and_pairs_to_look_at(prepared):
    content = report_of(prepared)
    assert content["sources"]["web"]["samples"]["quality"][0]["text"].startswith("BUY NOW")
    assert {"broken", "language", "exact", "near", "kept in high"} <= set(content["sources"]["web"]["samples"])
    assert any("meant nothing to them" in pair["dropped"]["text"] for pair in content["duplicates"]["near"])
    page = (prepared.data / "prepare_report.md").read_text()
    assert "BUY NOW" in page and "dropped: near | 2" in page


def test_control_tokens_spelled_out_stay_text(prepared):
    tokenizer, controls = load_tokenizer(prepared.tokenizer), set(CONTROL_TOKENS) - {CODE_PREFIX, CODE_MIDDLE, CODE_SUFFIX}
    ids = set(tokenizer.convert_tokens_to_ids(list(controls)))
    for entry in prepared_corpora(prepared).values():
        corpus = open_corpus(prepared.data, entry.corpus)
        found = np.concatenate([shard.tokens for shard in corpus.shards])
        assert np.isin(found, list(ids)).sum() == entry.documents    # one <|endoftext|> each
    assert any("<|user|> says <|endoftext|> " in text for text in texts_of(prepared, "web/high"))
    assert report_of(prepared)["sources"]["web"]["buckets"]["high"]["control_strings"] == 2


def test_the_middle_is_told_last_at_the_rate_and_nothing_is_lost(prepared):
    texts = texts_of(prepared, "code/all")
    rearranged = [text.removesuffix(END_OF_TEXT) for text in texts if text.startswith(CODE_PREFIX)]
    assert abs(len(rearranged) - len(texts) / 2) < 3 * sqrt(len(texts) / 4)
    assert report_of(prepared)["sources"]["code"]["buckets"]["all"]["rearranged"] == len(rearranged)
    originals, forms = {program(number).rstrip() for number in range(300)}, {"psm": 0, "spm": 0}
    for text in rearranged:
        before, _, middle = text.partition(CODE_MIDDLE)
        prefix, _, suffix = before.removeprefix(CODE_PREFIX).partition(CODE_SUFFIX)
        forms["psm" if prefix else "spm"] += 1
        assert (prefix + middle + suffix) in originals
    assert min(forms.values()) > len(rearranged) / 4


def start(recipe: PrepareRecipe) -> subprocess.Popen:
    """The stage in a process of its own, as `glm run` starts it."""
    path = Path(recipe.run_folder) / "recipe.json"
    write_json(path, dump_recipe(recipe))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([sys.executable, "-W", "ignore", "-m", "glm.rank", str(path)], env=environment)


@pytest.mark.full
def test_four_workers_give_the_same_bytes(prepared, raw, tmp_path, request):
    recipe = make_module_recipe(request)(tmp_path / "run", sources_of(raw), workers=4)
    assert start(recipe).wait(timeout=240) == 0
    assert corpora(RunFolder(tmp_path / "run")) == corpora(prepared)


def test_after_a_kill_the_stage_goes_on_and_gives_the_same_bytes(prepared, raw, tmp_path, request):
    recipe = make_module_recipe(request)(tmp_path / "run", sources_of(raw), workers=2)
    process, data = start(recipe), tmp_path / "run" / "data"
    deadline = time.monotonic() + 200
    while not list(data.glob("prepare-*/near/band-3-0")):
        assert process.poll() is None and time.monotonic() < deadline, "the stage ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (data / "prepared.json").exists(), "killed too late to show anything"
    assert len(list(data.glob("prepare-*/read/*/facts.json"))) > 3
    main(recipe.model_copy(update={"workers": 1}))
    assert corpora(RunFolder(tmp_path / "run")) == corpora(prepared)


def test_templated_pages_pass_minhash_and_not_the_semantic_step(raw, tmp_path, make_recipe):
    pages = [templated(number) for number in range(40)] + [essay(number, topic=f"topic {number}") for number in range(40)]
    write_jsonl(tmp_path / "raw.jsonl", pages)
    recipe = make_recipe(tmp_path / "run", {"web": source(path=str(tmp_path / "raw.jsonl"))},
                         semantic={"threshold": 0.9, "dimensions": 8})
    main(recipe)
    dropped = report_of(RunFolder(tmp_path / "run"))["sources"]["web"]["dropped"]
    assert "near" not in dropped and dropped["semantic"]["documents"] >= 35
    texts = texts_of(RunFolder(tmp_path / "run"), "web/all")
    assert sum("Welcome to the town" in text for text in texts) <= 5 and sum("Welcome" not in text for text in texts) >= 38


def test_too_many_broken_records_name_file_and_line(tmp_path, make_recipe):
    path = write_jsonl(tmp_path / "raw.jsonl", [essay(number) for number in range(40)])
    lines = path.read_text().splitlines()
    lines[11] = lines[25] = '{"text": '
    path.write_text("\n".join(lines) + "\n")
    sources = {"web": source(path=str(path))}
    with pytest.raises(DataError, match="raw.jsonl, line 26(.|\n)*more than 1 such"):
        main(make_recipe(tmp_path / "one", sources, broken_limit=1))
    main(make_recipe(tmp_path / "two", sources, broken_limit=2))
    assert report_of(RunFolder(tmp_path / "two"))["sources"]["web"]["broken_records"] == 2


def test_own_text_stands_for_every_corpus_of_the_installation(tmp_path, make_recipe):
    write_jsonl(tmp_path / "mine" / "raw.jsonl", [essay(number) for number in range(40)])
    quality = {"scorer": "heuristics", "buckets": {"high": 0.9, "medium": 0.1}}
    sources = {"prose": source(corpus="prose", quality=quality), "code": source(corpus="code", quality=quality)}
    main(make_recipe(tmp_path / "run", sources, data={"documents": str(tmp_path / "mine")}))
    found = prepared_corpora(RunFolder(tmp_path / "run"))
    assert {"prose/high", "prose/medium", "code/high", "code/medium"} <= set(found)
    assert len({entry.corpus for entry in found.values()}) == 1 and found["code/high"].documents == 40


def test_what_another_stage_prepared_stays_registered(tmp_path, make_recipe):
    write_jsonl(tmp_path / "raw.jsonl", [essay(number) for number in range(40)])
    recipe = make_recipe(tmp_path / "run", {"web": source(path=str(tmp_path / "raw.jsonl"))})
    folder = RunFolder(tmp_path / "run")
    other = {"corpus": "x", "documents": 1, "tokens": 2}
    write_json(folder.prepared, {"reports/all": other, "web/gone": other})
    main(recipe)
    assert set(prepared_corpora(folder)) == {"reports/all", "web/all"}


def test_held_out_documents_are_the_same_rearranged_or_not(tmp_path, make_recipe):
    write_jsonl(tmp_path / "raw.jsonl", [program(number) for number in range(200)])
    held_out = {}
    for rate in (0.0, 1.0):
        main(make_recipe(tmp_path / f"run{rate}", {"code": source(path=str(tmp_path / "raw.jsonl"), fim={"rate": rate})}))
        folder = RunFolder(tmp_path / f"run{rate}")
        held_out[rate] = open_corpus(folder.data, prepared_corpora(folder)["code/all"].corpus).validation_documents.tolist()
    assert held_out[0.0] == held_out[1.0] and len(held_out[0.0]) > 0


def test_shards_of_a_hundred_thousand_tasks_have_names_of_their_own():
    assert len({shard_name("my-web-all-abc", f"my-web-{number:05d}") for number in range(0, 300_000, 10_000)}) == 30


def prepared_but_killed(recipe, monkeypatch, at: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(prepare, at, lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            main(recipe)


def test_killed_at_its_end_the_stage_makes_again_what_was_lost_and_no_more(tmp_path, make_recipe, monkeypatch):
    write_jsonl(tmp_path / "raw.jsonl", [essay(number) for number in range(40)])
    sources = {"web": source(path=str(tmp_path / "raw.jsonl"))}
    main(make_recipe(tmp_path / "undisturbed", sources))
    recipe, folder = make_recipe(tmp_path / "run", sources), RunFolder(tmp_path / "run")
    prepared_but_killed(recipe, monkeypatch, "register")
    torn, lost, *_, whole = sorted(folder.data.glob("web-all-*.idx"))
    torn.write_bytes(torn.read_bytes() + b"a tail's")
    lost.with_suffix(".json").unlink()
    written = whole.stat().st_mtime_ns
    prepared_but_killed(recipe, monkeypatch, "give_up")
    assert whole.stat().st_mtime_ns == written
    (folder.data / ".prepare-x.tmp" / "read").mkdir(parents=True)
    monkeypatch.setattr(prepare.Preparation, "run", None)    # there is nothing left to do
    main(recipe)
    assert not list(folder.data.glob(".prepare-*")) and not list(folder.data.glob("prepare-*"))
    assert corpora(folder) == corpora(RunFolder(tmp_path / "undisturbed"))


def test_what_ranks_of_a_killed_launch_left_lets_no_folder_go_that_is_wanted(tmp_path):
    work = tmp_path / "prepare-x"
    write_json(work / "asked.json", "before")
    write_json(work / "answer-1.json", "before")
    rank_0 = threading.Thread(target=give_up, args=(work, Place(0, 0, 2)), daemon=True)
    rank_0.start()
    rank_0.join(0.5)
    assert rank_0.is_alive() and work.is_dir(), "rank 1 is not there yet"
    give_up(work, Place(1, 1, 2))
    rank_0.join(10)
    assert not rank_0.is_alive() and not list(tmp_path.iterdir())


def test_other_code_another_model_or_another_order_is_another_preparation(tmp_path, make_recipe, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(scorers, "_registered", {})
    for name in ("web", "books"):
        write_jsonl(tmp_path / f"{name}.jsonl", [essay(number) for number in range(4)])
    (tmp_path / "judge.py").write_text("from pretrain.scorers import register_scorer\nregister_scorer('judge')(lambda model: len)\n")
    (tmp_path / "model").write_text("1")
    quality = {"scorer": "judge", "options": {"model": str(tmp_path / "model")}}
    sources = {name: source(path=str(tmp_path / f"{name}.jsonl"), quality=quality) for name in ("web", "books")}

    def digest(**more) -> str:
        recipe = make_recipe(tmp_path / "run", sources, plugins=["judge"], **more)
        return prepare.Preparation.of(recipe, RunFolder.of(recipe)).digest

    found = [digest(), digest(order=["books", "web"])]
    (tmp_path / "model").write_text("2")
    found.append(digest())
    (tmp_path / "judge.py").write_text((tmp_path / "judge.py").read_text() + "# changed\n")
    found.append(digest())
    assert len(set(found)) == 4 and digest() == found[-1]


def held_out(text: str) -> bool:
    """As the corpus decides for documents of this text."""
    return int.from_bytes(hashlib.md5(f"validation {text_key(text)}".encode()).digest(), "big") % HELD_OUT_MODULUS == 0


def test_a_bucket_wholly_held_out_is_told_and_the_others_are_made(tmp_path, make_recipe, capsys):
    few = [next(essay(number) for number in range(1000, 2000) if held_out(essay(number)))]
    write_jsonl(tmp_path / "few.jsonl", few)
    write_jsonl(tmp_path / "many.jsonl", [essay(number) for number in range(40)])
    sources = {name: source(path=str(tmp_path / f"{name}.jsonl")) for name in ("many", "few")}
    main(make_recipe(tmp_path / "run", sources))
    assert set(prepared_corpora(RunFolder(tmp_path / "run"))) == {"many/all"}
    assert "few/all: only documents that fell to validation" in capsys.readouterr().out
    with pytest.raises(DataError, match="few/all(.|\n)*give more text"):
        main(make_recipe(tmp_path / "alone", {"few": sources["few"]}))
