"""`glm show --paper`: every number of the report is there, and a recipe that has another is marked."""

import ast
import json
from pathlib import Path

import pytest

from glm.cli import main
from glm.recipe.compose import Run, dump_recipe, load_run
from glm.recipe.saved import flatten
from glm.show.document import DOCUMENT, with_tables
from glm.show.paper import ABSENT, compare, facts

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "glm45"
FACTS = facts()
RUNS = {name: load_run(CONFIGS / f"{name}.yaml") for name in ("355b", "air")}

# Sections 2.1 to 2.4 and 3 of the report, by the names of paper.yaml.
SAID = set("""
    total_parameters active_parameters num_layers num_dense_layers num_mtp_layers hidden_size dense_ffn_size expert_ffn_size num_attention_heads
    num_query_groups head_dim num_experts experts_per_token num_shared_experts qk_norm attention_bias routing routed_scaling_factor rotary_percent
    vocab_size max_position norm_epsilon dropout run_tokens tokens_general tokens_code_reasoning tokens_repo_code tokens_reasoning
    tokens_long_context packing optimizer adamw_on newton_schulz_steps momentum update_rms weight_decay lr_clock lr_shape peak_lr final_lr
    decay_until batch_start batch_end batch_over sequence_length rotary_base mtp_weight sequence_balance_weight bias_update_rate sft_cold_start
    sft_unified rl_algorithm rl_kl rl_length rl_curriculum rl_temperature rl_agentic rl_general distillation
""".split())
OPEN = set("""
    coefficients nesterov scale head_rule split_qkv split_gate_up router_rule adamw_lr adamw_betas adamw_eps clip_grad warmup batch_shape init_std
    precision z_loss mixture_shares cross_document_attention tokenizer_training sft_tokens sft_lr sft_batch rl_group_size rl_lr rl_clip_low rl_clip_high
""".split())


def rows_of(capsys, *words: str) -> dict[str, dict]:
    assert main(["show", *words, "--paper", "--json"]) == 0
    return {row["id"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}


@pytest.mark.parametrize("name", ["355b", "air"])
def test_every_number_of_the_report_is_there_and_equal_and_every_open_choice_has_its_reason(name, capsys):
    rows = rows_of(capsys, str(CONFIGS / f"{name}.yaml"))
    assert SAID <= {name for name, row in rows.items() if row["mark"] != "open"}
    assert OPEN <= {name for name, row in rows.items() if row["mark"] == "open"}
    assert {row["id"] for row in rows.values() if row["mark"] == "differs"} == {
        "sft_unified", "rl_curriculum", "rl_temperature", "rl_agentic", "rl_general", "distillation",    # what this release does not do
        "corpora", "agent_trajectories"}, "and data that nobody published"
    for row in rows.values():
        assert row["section"] and (row["note"] if row["mark"] == "open" else row["paper"] is not None), row["id"]
        assert row["ours"] not in (None, ABSENT), row["id"]
    assert rows["num_layers"]["paper"] == {"355b": 92, "air": 46}[name] and rows["qk_norm"]["paper"] is (name == "355b")
    assert rows["mtp_weight"]["paper"] == {"pretrain_general": 0.3} | dict.fromkeys(
        ("pretrain_code_reasoning", "midtrain_repo_code", "midtrain_reasoning", "midtrain_long_context"), 0.1)


pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer")
KEYED = [fact for fact in FACTS if fact.recipe and not fact.open]


@pytest.mark.parametrize("fact", KEYED, ids=lambda fact: fact.id)
def test_a_recipe_with_another_value_in_one_stage_is_marked(fact):
    run = RUNS["355b"]
    stages = list(fact.paper) if isinstance(fact.paper, dict) and set(fact.paper) & set(run.stages) else (
        [next(iter(run.stages))] if fact.where == "model" else ["midtrain_reasoning"] if fact.where == "run" else list(fact.where))
    changed = compare(_with(run, stages[-1], fact.recipe), [fact])[0]
    assert (compare(run, [fact])[0].mark, changed.mark) == ("equal", "differs")


def _with(run: Run, stage: str, key: str) -> Run:
    """The run with another value at ``key`` of one stage: one more, another word, the other truth. No type looks at it."""
    def changed(section, words: list[str]):
        value = section[words[0]] if isinstance(section, dict) else getattr(section, words[0])
        if len(words) > 1:
            other = changed(value, words[1:])
        else:
            other = not value if isinstance(value, bool) else value + ("x" if isinstance(value, str) else 1)
        return section | {words[0]: other} if isinstance(section, dict) else section.model_copy(update={words[0]: other})

    return Run(run.name, run.run_folder, run.path, run.stages | {stage: changed(run.stages[stage], key.split("."))}, run.origins)


def test_an_override_flips_its_mark_and_says_who_set_it(capsys):
    before = rows_of(capsys, str(CONFIGS / "355b.yaml"))
    after = rows_of(capsys, str(CONFIGS / "355b.yaml"), "midtrain_reasoning.losses.mtp_weight=0.2", "optimizer.nesterov=false", "model.num_layers=80")
    assert {name for name, row in after.items() if row["mark"] != before[name]["mark"]} == {"mtp_weight", "num_layers", "total_parameters", "active_parameters"}
    assert after["mtp_weight"]["ours"]["midtrain_reasoning"] == 0.2 and "command line" in after["mtp_weight"]["set_by"]
    assert after["nesterov"]["ours"] is False and after["nesterov"]["mark"] == "open", "still our choice"
    assert rows_of(capsys, str(CONFIGS / "355b.yaml"), "pretrain_general.tokens=14T")["run_tokens"]["mark"] == "differs"


def test_a_run_without_some_of_the_stages_is_told_what_it_lacks(capsys):
    rows = rows_of(capsys, str(CONFIGS / "30m.yaml"))
    assert rows["tokens_long_context"]["ours"] == ABSENT and rows["tokens_long_context"]["mark"] == "differs"
    assert main(["show", str(CONFIGS / "30m.yaml"), "--paper"]) == 0 and "equal" in capsys.readouterr().out
    assert main(["show", str(CONFIGS / "30m.yaml"), "--paper", "pretrain_general"]) == 2


def test_every_key_of_a_fact_is_one_of_a_recipe_and_every_open_choice_of_muon_is_a_fact():
    recipes = [run.stages[stage] for run in RUNS.values() for stage in run.stages]
    known = {key for recipe in recipes for key in {**dump_recipe(recipe), **flatten(dump_recipe(recipe))}}
    assert {fact.recipe for fact in FACTS if fact.recipe} <= known
    said = {fact.recipe for fact in FACTS}
    assert {f"optimizer.{key}" for key in flatten(dump_recipe(RUNS["355b"].stages["pretrain_general"])["optimizer"])} - said == {"optimizer.frozen"}


def test_code_and_tests_that_facts_name_exist():
    for fact in FACTS:
        for named, separator in ((fact.code, ":"), (fact.test, "::")):
            file, _, name = named.partition(separator)
            assert named or fact.paper != fact.fixed and not fact.open, f"{fact.id}: nothing shows it"
            if named:
                tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
                assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}, named


def test_the_document_has_the_tables_of_the_facts():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run `python -m glm.show.document`"
