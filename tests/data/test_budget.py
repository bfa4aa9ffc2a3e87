"""What ``glm check`` says of the data of a run, before a stage has run and after."""

import json

import pytest

from glm.check import check_runs, print_budgets
from glm.checkpoint.run_folder import RunFolder, write_json
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
    assert budget.there == pytest.approx(report["tokens"], rel=0.02) and budget.epochs == pytest.approx(report["epochs"], rel=0.02)


def test_the_table_says_what_is_not_prepared_yet(tiny_stages, run_folder, capsys):
    print_budgets(stage_budgets(with_sources(tiny_stages["pretrain_general"], run_folder, web=Source(corpus="web/high", share=1))))
    assert "not prepared yet" in capsys.readouterr().out


def test_check_fails_when_a_source_would_be_read_too_often(tmp_path, capsys):
    folder = RunFolder(tmp_path / "run")
    write_json(folder.prepared, {"prose/high": {"corpus": "w", "documents": 10, "tokens": 50_000}})
    changes = [f"run_folder={folder.root}", "pretrain_general.data.sources.prose_high.epochs=4"]
    assert check_runs([str(TINY)], changes, as_json=False) == 1
    assert "pretrain_general reads source prose_high 5.64 times, at most 4 are allowed: it has 49000 tokens and would need 69120" in capsys.readouterr().out
