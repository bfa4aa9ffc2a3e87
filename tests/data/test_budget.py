"""What ``glm check`` says of the data of a run, before a stage has run and after."""

import json

import pytest

from glm.check import check_runs, print_budgets
from glm.checkpoint.run_folder import RunFolder, write_json
from glm.data.batches import Batches
from glm.data.budget import stage_budgets, totals
from glm.data.prepare import prepare
from glm.errors import DataError
from glm.recipe.sections import Source
from tests.data.conftest import TINY


def with_sources(recipe, run_folder, **sources):
    data = recipe.data.model_copy(update={"sources": sources})
    return recipe.model_copy(update={"data": data, "run_folder": str(run_folder.root)})


def test_a_source_nobody_prepared_has_no_epochs_and_is_not_over(tiny_stages, run_folder):
    recipe = with_sources(tiny_stages["pretrain_general"], run_folder, web=Source(corpus="web/high", share=0.25, epochs=1),
                          prose=Source(corpus="prose", share=0.75))
    web, prose = stage_budgets(recipe)
    assert (web.asked, prose.asked) == (192_000, 576_000)
    assert web.there is prose.there is web.epochs is None and not web.is_over and web.least == 192_000


def test_epochs_are_counted_against_what_prepare_stages_made_and_over_all_stages(tiny_stages, run_folder):
    write_json(run_folder.prepared, {"web/high": {"corpus": "w", "documents": 10, "tokens": 50_000}})
    recipe = with_sources(tiny_stages["pretrain_general"], run_folder, web=Source(corpus="web/high", share=1, epochs=16))
    (budget,) = stage_budgets(recipe)
    assert budget.there == 49_000 and budget.epochs == pytest.approx(768_000 / 49_000) and not budget.is_over
    lower = with_sources(recipe, run_folder, web=Source(corpus="web/high", share=1, epochs=15))
    assert stage_budgets(lower)[0].is_over
    assert totals([budget, *stage_budgets(lower)]) == {"web/high": pytest.approx(2 * 768_000 / 49_000)} and totals([budget]) == {}
    run_folder.prepared.write_text("no list")
    with pytest.raises(DataError, match="prepared.json"):
        stage_budgets(recipe)


def test_what_a_stage_tokenized_itself_is_what_it_reads(tiny_stages, run_folder):
    recipe = with_sources(tiny_stages["pretrain_general"], run_folder, problems=Source(corpus="problems", share=1))
    prepare(recipe, run_folder)
    report = json.loads((run_folder.data / "report.json").read_text())[recipe.stage]["problems"]
    (budget,) = stage_budgets(recipe)
    assert budget.there == report["tokens"] and budget.epochs == pytest.approx(report["epochs"], rel=0.02)


def test_sources_of_one_corpus_are_counted_together(tiny_stages, run_folder, tmp_path, capsys):
    """The user's own text is every built-in corpus: half of the stage from each of two sources is all of it from one corpus."""
    (tmp_path / "book.txt").write_text(" ".join(f"word{i}" for i in range(20_000)))
    recipe = tiny_stages["pretrain_general"]
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"documents": str(tmp_path / "book.txt")})})
    sources = {"prose": Source(corpus="prose", share=0.5), "code": Source(corpus="code", share=0.5)}
    recipe = with_sources(recipe, run_folder, **sources)
    prepare(recipe, run_folder)
    assert "with the others" in capsys.readouterr().out
    report = json.loads((run_folder.data / "report.json").read_text())[recipe.stage]
    whole = report["prose"]["corpus_epochs"]
    assert whole == report["code"]["corpus_epochs"] == pytest.approx(2 * report["prose"]["epochs"], rel=0.02)
    limited = with_sources(recipe, run_folder, **sources | {"code": Source(corpus="code", share=0.5, epochs=whole * 0.75)})
    budgets = stage_budgets(limited)
    assert all(budget.is_over and budget.epochs < budget.corpus_at_most for budget in budgets)
    assert totals(budgets) == {"prose, code": pytest.approx(whole, rel=0.01)}
    print_budgets(budgets)
    assert capsys.readouterr().out.count("reads sources prose, code") == 1
    with pytest.raises(DataError, match="sources prose, code(.|\n)*one corpus they read"):
        Batches(limited, run_folder)


def test_the_table_says_what_is_not_prepared_yet(tiny_stages, run_folder, capsys):
    print_budgets(stage_budgets(with_sources(tiny_stages["pretrain_general"], run_folder, web=Source(corpus="web/high", share=1))))
    assert "not prepared yet" in capsys.readouterr().out


def test_check_fails_when_a_source_would_be_read_too_often(tmp_path, capsys):
    folder = RunFolder(tmp_path / "run")
    write_json(folder.prepared, {"prose/high": {"corpus": "w", "documents": 10, "tokens": 50_000}})
    changes = [f"run_folder={folder.root}", "pretrain_general.data.sources.prose_high.epochs=4"]
    assert check_runs([str(TINY)], changes, as_json=False) == 1
    assert "pretrain_general reads source prose_high 5.64 times, at most 4 are allowed: it has 49000 tokens and would need 69120" in capsys.readouterr().out
