"""Run files, their axis files, and what happens when one of them is wrong."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from glm.checkpoint.run_folder import write_json
from glm.errors import RecipeError
from glm.recipe.compose import dump_recipe, load_recipe, load_run
from glm.recipe.schema import RLRecipe, TrainRecipe

CONFIGS = Path(__file__).parents[2] / "configs" / "glm45"
TINY = CONFIGS / "tiny.yaml"
RUN_FILES = sorted(CONFIGS.glob("*.yaml"))
BASE = {
    "model/m.yaml": (CONFIGS / "model/tiny.yaml").read_text(),
    "hardware/h.yaml": "platform: host\nlauncher: {ranks_per_node: 2}\nprecision: {params: fp32}\nlayout: {ep: 2}\n",
    "mixture/mix.yaml": "sources:\n  a: {corpus: prose, share: 0.5}\n  b: {corpus: code, share: 0.5}\n",
    "stage/learn.yaml": (
        "main: pretrain.train\ntokens: 1M\nsequence_length: 64\nrotary_base: 10_000\ndata: {mixture: mix}\nbatch: {tokens: 4096}\n"
        "optimizer: {name: muon, momentum: 0.9}\nschedule: {peak_lr: 1e-3, final_lr: 1e-4}\n"
    ),
    "run.yaml": "name: test\nmodel: m\nhardware: h\nstages:\n  learn: {}\n  again:\n    stage: learn\n    tokens: 2M\n",
}


@pytest.fixture
def folder(tmp_path):
    """A folder of small valid configs; call it with files to replace."""
    def write(**changed: str) -> Path:
        for name, text in (BASE | {key.replace("__", "/") + ".yaml": text for key, text in changed.items()}).items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return tmp_path / "run.yaml"

    return write


def complaint(path: Path, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_run(path, list(overrides))
    return caught.value


def test_every_run_file_loads_and_its_recipes_survive_the_trip_through_json(tmp_path):
    assert {path.stem for path in RUN_FILES} >= {"tiny", "air", "355b"}
    for path in RUN_FILES:
        for stage, recipe in load_run(path).stages.items():
            write_json(tmp_path / "recipe.json", dump_recipe(recipe))
            again = load_recipe(tmp_path / "recipe.json")
            assert again == recipe and type(again) is type(recipe), (path, stage)


def test_every_axis_file_is_valid_and_used():
    files = {axis: {path.stem for path in (CONFIGS / axis).glob("*.yaml")} for axis in ("model", "stage", "hardware")}
    runs = [load_run(path) for path in RUN_FILES]
    assert files["stage"] == set().union(*(run.stages for run in runs))
    assert files["model"] == {yaml.safe_load(path.read_text())["model"] for path in RUN_FILES}
    for name in files["hardware"]:
        one_rank = ["launcher.nodes=1", "launcher.ranks_per_node=1", "layout.ep=1", "midtrain_long_context.layout.cp=1"]
        places = load_run(TINY, [f"hardware={name}", *one_rank]).origins["rl_reasoning"]
        assert f"hardware/{name}.yaml:" in places["platform"]


def test_the_paper_s_numbers_are_in_the_stage_files_and_tiny_keeps_their_proportions():
    large, tiny = load_run(CONFIGS / "355b.yaml").stages, load_run(TINY).stages
    trained = [stage for stage in large if isinstance(large[stage], TrainRecipe) and large[stage].schedule.clock == "run"]
    assert [large[stage].tokens for stage in trained] == [15 * 10**12, 7 * 10**12, 5 * 10**11, 5 * 10**11, 10**11]
    assert [large[stage].sequence_length for stage in trained] == [4096, 4096, 32768, 32768, 131072]
    assert {large[stage].schedule.decay_until for stage in trained} == {23_100_000_000_000}
    assert len({large[stage].schedule for stage in trained}) == 1, "one cosine through all stages"
    unit = tiny["pretrain_general"].tokens // 15  # tokens of the tiny run for 1T
    for stage in trained:
        assert tiny[stage].tokens * 10**12 == large[stage].tokens * unit
        assert tiny[stage].sequence_length * 64 == large[stage].sequence_length
        assert tiny[stage].losses == large[stage].losses and tiny[stage].router == large[stage].router
        assert tiny[stage].rotary_base == large[stage].rotary_base and tiny[stage].data == large[stage].data
        ramp, small = large[stage].batch.tokens, tiny[stage].batch.tokens
        assert (ramp.end // ramp.start, small.over * 10**12) == (small.end // small.start, ramp.over * unit)
    assert tiny["sft_cold_start"].run_tokens_before == sum(tiny[stage].tokens for stage in trained)


def test_run_tokens_follow_the_parents_and_the_default_parent_is_the_last_stage_with_weights():
    stages = load_run(TINY).stages
    assert stages["tokenizer"].parent is None and stages["pretrain_general"].parent is None
    assert stages["midtrain_repo_code"].parent == "pretrain_code_reasoning"
    assert stages["midtrain_repo_code"].run_tokens_before == sum(
        stages[stage].tokens for stage in ("pretrain_general", "pretrain_code_reasoning")
    )
    assert stages["export"].parent == "rl_reasoning" and stages["chat"].parent == "export"


def test_tokenizer_export_and_chat_run_as_one_rank_whatever_is_said_for_all():
    stages = load_run(TINY, ["layout.tp=2", "launcher.ranks_per_node=4"]).stages
    assert [stages[name].world_size for name in ("tokenizer", "export", "chat", "rl_reasoning")] == [1, 1, 1, 4]
    assert stages["export"].layout.tp == 1 and stages["rl_reasoning"].layout.tp == 2


def test_later_settings_win_map_by_map_and_origins_say_who_won(folder):
    run_file = folder(run="model: m\nhardware: h\noptimizer: {nesterov: false}\nstages:\n  learn:\n    optimizer: {momentum: 0.8}\n")
    run = load_run(run_file, ["learn.optimizer.clip_grad=0.5"])
    muon, places = run.stages["learn"].optimizer, run.origins["learn"]
    assert (muon.nesterov, muon.momentum, muon.clip_grad) == (False, 0.8, 0.5)
    assert places["optimizer.nesterov"].endswith("run.yaml:3") and places["optimizer.momentum"].endswith("run.yaml:6")
    assert places["optimizer.clip_grad"] == "command line" and places["optimizer.name"].endswith("stage/learn.yaml:7")
    assert "optimizer.weight_decay" not in places
    assert run.name == "run" and run.run_folder == Path.cwd() / "runs" / "run"


def test_a_map_that_names_another_variant_replaces_the_old_one(folder):
    run = load_run(folder(), ["optimizer.name=adamw", "learn.optimizer.betas=[0.8, 0.9]"])
    optimizer = run.stages["learn"].optimizer
    assert (optimizer.name, optimizer.betas, hasattr(optimizer, "momentum")) == ("adamw", (0.8, 0.9), False)
    again = load_run(folder(run="model: m\nhardware: h\noptimizer: {name: adamw, eps: 1e-6}\nstages: {learn: {optimizer: {weight_decay: 0}}}\n"))
    assert (again.stages["learn"].optimizer.eps, again.stages["learn"].optimizer.weight_decay) == (1e-6, 0)


@pytest.mark.parametrize("change, found", [
    ("optimizer.betas=[0.8, 0.9]", "unknown key `optimizer.betas`"), ("optimizer={name: adamw, momentum: 0.9}", "unknown key `optimizer.momentum`"),
    ("optimizer.name=adam", "`optimizer.name: adam`"),
])
def test_a_key_of_another_variant_or_an_unknown_variant_is_named(folder, change, found):
    with pytest.raises(RecipeError) as error:
        load_run(folder(), [change])
    assert error.value.found == found


def test_counts_and_exponents_are_numbers_and_off_is_a_word(folder):
    run = load_run(folder(), ["logging.wandb=off", "learn.tokens=0.5B", "schedule.peak_lr=1e-4", "rotary_base=20_000"])
    recipe = run.stages["learn"]
    assert (recipe.logging.wandb, recipe.tokens, recipe.schedule.peak_lr, recipe.rotary_base) == ("off", 500_000_000, 1e-4, 20_000)


def test_command_line_keys_reach_one_stage_or_all_that_have_the_section(tmp_path):
    run = load_run(TINY, ["seed=7", "data.problems=5K", "rl_reasoning.rl.steps=3", "tokenizer.vocab_size=1024", f"run_folder={tmp_path}"])
    assert {recipe.seed for recipe in run.stages.values()} == {7}
    assert run.stages["tokenizer"].data.problems == run.stages["sft_cold_start"].data.problems == 5000
    assert run.stages["rl_reasoning"].rl.steps == 3 and run.stages["tokenizer"].tokenizer.vocab_size == 1024
    assert run.run_folder == tmp_path and run.stages["chat"].run_folder == str(tmp_path)


def test_documents_are_relative_to_where_the_command_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages = load_run(TINY, ["data.documents=notes"]).stages
    assert stages["tokenizer"].data.documents == stages["pretrain_general"].data.documents == str(tmp_path / "notes")


def test_the_mixture_is_part_of_the_recipe_and_may_be_changed_by_the_run_file(folder):
    sources = load_run(folder(), ["data.sources={a: {share: 0.2}, b: {share: 0.8}}"]).stages["learn"].data.sources
    assert {name: (source.corpus, source.share) for name, source in sources.items()} == {"a": ("prose", 0.2), "b": ("code", 0.8)}


def test_the_batch_of_rl_is_what_one_rollout_gives():
    recipe = load_run(TINY, ["rl_reasoning.rollout.group_size=4"]).stages["rl_reasoning"]
    assert isinstance(recipe, RLRecipe)
    assert recipe.batch.tokens == recipe.rollout.prompts_per_step * 4 * recipe.sequence_length


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.floats(1e-6, 1, allow_nan=False), st.sampled_from(["truncate", "best_fit"]))
def test_any_override_survives_the_trip_through_json(seed, lr, packing):
    overrides = [f"seed={seed}", f"schedule.peak_lr={lr!r}", f"data.packing={packing}"]
    recipe = load_run(TINY, overrides).stages["midtrain_reasoning"]
    assert (recipe.seed, recipe.schedule.peak_lr, recipe.data.packing) == (seed, lr, packing)
    assert type(recipe).model_validate(dump_recipe(recipe)) == recipe


def test_a_key_set_twice_names_both_lines(folder):
    error = complaint(folder(stage__learn=BASE["stage/learn.yaml"] + "tokens: 3M\n"))
    assert error.where.endswith("stage/learn.yaml:9") and error.found == "'tokens' set a second time (first on line 2)"


def test_an_unknown_key_names_its_line_and_the_nearest_one(folder):
    error = complaint(folder(stage__learn=BASE["stage/learn.yaml"].replace("momentum", "momentun")))
    assert error.where.endswith("stage/learn.yaml:7") and error.found == "unknown key `optimizer.momentun`"
    assert error.todo == "did you mean `momentum`?"
    error = complaint(folder(stage__learn=BASE["stage/learn.yaml"], run=BASE["run.yaml"] + "optimiser: {}\n"))
    assert error.where.endswith("run.yaml:9") and error.todo == "did you mean `optimizer`?"


def test_a_wrong_value_names_its_line_the_value_and_the_type(folder):
    error = complaint(folder(stage__learn=BASE["stage/learn.yaml"].replace("1M", "many")))
    assert error.where.endswith("stage/learn.yaml:2") and error.found == "`tokens: many`"
    assert error.expected == "a count such as 500B, 16M or 4096, found 'many'"
    error = complaint(folder(), "batch.tokens={start: 1, end: lots, over: 2}")
    assert error.found == "`batch.tokens.end: lots`" and error.where == "command line"
    error = complaint(folder(), "learn.data.packing=loose")
    assert error.expected == "Input should be 'truncate' or 'best_fit'"


def test_a_missing_value_is_named(folder):
    error = complaint(folder(stage__learn=BASE["stage/learn.yaml"].replace("rotary_base: 10_000\n", "")))
    assert error.found == "no `rotary_base`"
    error = complaint(folder(stage__learn=BASE["stage/learn.yaml"].replace(", final_lr: 1e-4", "")))
    assert error.found == "no `schedule.final_lr`" and error.where.endswith("stage/learn.yaml:8")


def test_an_axis_file_may_set_only_its_own_sections(folder):
    error = complaint(folder(hardware__h=BASE["hardware/h.yaml"] + "optimizer: {momentum: 1}\n"))
    assert error.where.endswith("hardware/h.yaml:5") and error.found == "`optimizer` in a hardware file" and "stage file" in error.todo
    error = complaint(folder(stage__learn=BASE["stage/learn.yaml"] + "layout: {tp: 2}\n", hardware__h=BASE["hardware/h.yaml"]))
    assert error.found == "`layout` in a stage file" and "hardware file" in error.todo


@pytest.mark.parametrize("axis, line", [("model: m", "model: n"), ("hardware: h", "hardware: hh"), ("stage: learn", "stage: lern")])
def test_a_file_that_does_not_exist_is_named_with_the_nearest(folder, axis, line):
    error = complaint(folder(run=BASE["run.yaml"].replace(axis, line)))
    name = line.split(": ")[1]
    assert f"{name}'" in error.found and f"{name}.yaml" in error.expected and "run.yaml:" in error.where
    assert error.todo in ("did you mean `h`?", "did you mean `learn`?", "there is: m")


def test_a_mixture_that_does_not_exist_or_does_not_sum_to_one_is_an_error(folder):
    error = complaint(folder(stage__learn=BASE["stage/learn.yaml"].replace("mixture: mix", "mixture: mixx")))
    assert error.where.endswith("stage/learn.yaml:5") and error.todo == "did you mean `mix`?"
    error = complaint(folder(stage__learn=BASE["stage/learn.yaml"], mixture__mix=BASE["mixture/mix.yaml"].replace("0.5}\n  b", "0.4}\n  b")))
    assert "sum to 1, not 0.9" in error.expected and "mixture/mix.yaml" in error.where


def test_a_parent_must_stand_above_its_child(folder):
    error = complaint(folder(run=BASE["run.yaml"].replace("learn: {}", "learn: {from: again}")))
    assert error.where.endswith("run.yaml:5") and error.found == "from: again" and error.expected == "a stage above learn"


@pytest.mark.parametrize("override, todo", [
    ("sed=1", "did you mean `seed`?"), ("lern.tokens=1", "did you mean `learn`?"), ("learn.token=1", "did you mean `tokens`?"),
    ("model.hidden=1", "did you mean `hidden_size`?"),
])
def test_an_override_of_nothing_says_what_was_meant(folder, override, todo):
    assert complaint(folder(), override).todo == todo


def test_an_override_without_a_value_and_one_of_the_bookkeeping_are_refused(folder):
    assert "KEY=VALUE" in complaint(folder(), "seed").expected
    assert complaint(folder(), "stages=1").found == "`stages` on the command line"
    assert "run_tokens_before" in complaint(folder(), "run_tokens_before=3").found
    assert "model" in complaint(folder(), "learn.model.hidden_size=64").found


def test_a_chat_stage_without_prompts_is_refused():
    assert "prompts: []" in complaint(RUN_FILES[0].parent / "tiny.yaml", "chat.prompts=[]").found


def test_a_file_that_is_not_text_or_cannot_be_read_is_named(folder):
    broken = folder().parent / "broken.yaml"
    broken.write_bytes(b"name: x\nnote: caf\xe9\n")
    assert complaint(broken).where.endswith("broken.yaml:2") and "0xe9" in complaint(broken).found
    broken.write_bytes(b"name: \x07\n")
    assert "broken.yaml" in complaint(broken).where
    broken.write_text("name: " + "[" * 5000)
    assert "nested too deeply" in complaint(broken).found
    broken.write_text("name: x\nnote: " + "9" * 5000)
    assert complaint(broken).where.endswith("broken.yaml:2") and "digits" in complaint(broken).found
    broken.unlink()
    broken.symlink_to("/proc/self/mem")  # opens for everyone, and fails to read at its beginning, for root too
    assert "not readable" in complaint(broken).found


@pytest.mark.parametrize("key", ["seed", "run_folder", "learn.tokens"])
def test_an_override_given_twice_is_refused(folder, key):
    with pytest.raises(RecipeError) as caught:
        load_run(folder(), [f"{key}=1", f"{key}=2"])
    assert caught.value.found == f"{key} set twice ({key}=2 after {key}=1)" and caught.value.expected == "each key once"


def test_broken_yaml_names_its_line(folder):
    error = complaint(folder(run="model: m\nhardware: [h\nstages: {}\n"))
    assert error.where.endswith("run.yaml:3") and error.expected == "YAML"
    assert "no such file" in complaint(Path("configs/nowhere.yaml")).found


@pytest.mark.parametrize("override, found", [
    ("layout.tp=3", "2 ranks for tp 3 x pp 1 x cp 1 = 3"),
    ("layout.ep=4", "ep 4 x etp 1 on the 2 ranks"),
    ("model.num_experts=7", "num_experts 7 over ep 2"),
    ("sequence_length=4096", "sequence_length 4096"),
    ("batch.tokens=64", "a batch of 64 tokens for 2 data-parallel ranks x 64 tokens"),
])
def test_what_cannot_be_divided_is_refused_with_the_numbers(folder, override, found):
    assert found in complaint(folder(), override).found


def test_tensor_parallelism_must_divide_heads_and_groups(folder):
    assert "num_query_groups 2 over tp 4" in complaint(folder(), "layout.tp=4", "launcher.ranks_per_node=4").found
    load_run(folder(), ["layout.tp=2", "layout.ep=2"])


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    assert "a tokenizer of 4096 entries, an embedding of 2048" in complaint(TINY, "tokenizer.vocab_size=4096").found


def test_the_yaml_of_a_dumped_recipe_shows_no_python_types():
    yaml.safe_dump(dump_recipe(load_run(TINY).stages["rl_reasoning"]))
