"""Folder to checkpoint to folder without a change, and a verification that finds what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm.checkpoint import store
from glm.checkpoint.run_folder import RunFolder, write_json
from glm.convert.from_hf import from_hf
from glm.convert.source import find_source
from glm.convert.to_hf import to_hf
from glm.convert.verify import verify
from glm.errors import CheckpointError
from glm.recipe.schema import ExportRecipe
from glm.weights.hf_reader import HFFolder
from tests.model_fixture import SHAPES, random_hf_weights, tiny_shape, write_hf_folder
from tests.tokenizer_fixture import write_tokenizer
from tools.convert import from_hf as from_hf_command, to_hf as to_hf_command, verify as verify_command

ROOT = Path(__file__).resolve().parents[2]
SHAPE = tiny_shape(init_std=0.1)  # as in the fixture's configuration


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hf_folder(tmp_path_factory.mktemp("hf"), SHAPE, random_hf_weights(SHAPE))


@pytest.fixture(scope="module")
def run(tmp_path_factory, folder):
    """A run with two finished stages and a tokenizer; only the last stage's checkpoint has the weights of ``folder``."""
    root = tmp_path_factory.mktemp("run")
    run = RunFolder(root)
    other = write_hf_folder(tmp_path_factory.mktemp("other"), SHAPE, random_hf_weights(SHAPE, seed=7))
    for stage, source in (("pretrain", other), ("a_later_stage", folder)):
        from_hf(source, run.checkpoints(stage))
        write_json(run.done(stage), {})
    write_tokenizer(run.tokenizer, SHAPE.vocab_size)
    return root


@pytest.fixture(scope="module")
def exported(tmp_path_factory, run):
    out = tmp_path_factory.mktemp("out") / "export"
    to_hf(run, out)
    return out


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def change_one(folder: Path, name: str, change) -> None:
    """Changes one tensor in a folder without a manifest that would tell."""
    (folder / "manifest.json").unlink(missing_ok=True)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            change(tensors[name])
            save_file(tensors, file, {"format": "pt"})


def test_import_and_export_change_no_byte(tmp_path, folder, run, exported):
    before, after = all_tensors(folder), all_tensors(exported)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name].numpy().tobytes() != after[name].numpy().tobytes()] == []
    from_hf(exported, tmp_path / "again")
    to_hf(tmp_path / "again", tmp_path / "twice", tokenizer=run / "tokenizer")
    same = {path.name: path.read_bytes() for path in exported.iterdir() if path.name != "manifest.json"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "twice").iterdir() if path.name != "manifest.json"} == same


def test_a_bfloat16_folder_stays_bfloat16_and_verifies(tmp_path):
    weights = {name: tensor if name.endswith("_bias") else tensor.bfloat16() for name, tensor in random_hf_weights(SHAPES["odd"]).items()}
    source = write_hf_folder(tmp_path / "hf", SHAPES["odd"], weights, dtype="bfloat16")
    checkpoint = from_hf(source, tmp_path / "checkpoints")
    assert store.stored_params(checkpoint) == "bf16"
    to_hf(checkpoint, tmp_path / "out")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in all_tensors(tmp_path / "out").items())
    assert verify(checkpoint, tmp_path / "out").max_logit_difference < 1e-5


def test_an_export_verifies(run, exported):
    found = verify(run, exported)
    assert found.tensors == len(all_tensors(exported)) and found.max_logit > 1
    assert found.max_logit_difference < 1e-5 and found.mtp_loss_difference < 1e-5


@pytest.mark.parametrize("name", [
    "model.layers.2.mlp.experts.7.up_proj.weight", "model.layers.1.mlp.gate.e_score_correction_bias", "model.layers.4.hnorm.weight",
])
def test_one_changed_element_is_found_and_named(run, tmp_path, name):
    to_hf(run, tmp_path / "export")

    def change(tensor):
        tensor.view(-1)[3] += 1e-2

    change_one(tmp_path / "export", name, change)
    with pytest.raises(CheckpointError, match=rf"1 of 181 tensors differ, most: {name} by 0\.01"):
        verify(run, tmp_path / "export")


def test_another_stage_is_told_from_its_own_export(run, exported):
    with pytest.raises(CheckpointError, match="tensors differ"):
        verify(run, exported, stage="pretrain")


def test_another_rotary_base_in_config_json_is_found(run, tmp_path):
    to_hf(run, tmp_path / "export")
    config = json.loads((tmp_path / "export/config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 20_000
    (tmp_path / "export/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="rotary_base 20000"):
        verify(run, tmp_path / "export")


def test_equal_tensors_with_other_logits_do_not_pass(run, exported):
    with pytest.raises(CheckpointError, match="equal tensors, but logits differ"):
        verify(run, exported, tolerance=0.0)


def test_a_run_means_the_newest_checkpoint_of_the_stage_that_finished_last(run, tmp_path):
    found = find_source(run)
    assert found.checkpoint == RunFolder(run).checkpoints("a_later_stage") / "step_00000000"
    assert found.tokenizer == run / "tokenizer" == find_source(found.checkpoint).tokenizer
    assert "pretrain" in str(find_source(run, "pretrain").checkpoint)
    with pytest.raises(CheckpointError, match="one of a_later_stage, pretrain"):
        find_source(run, "sft")
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        find_source(tmp_path)


def test_an_import_does_not_touch_checkpoints_that_are_there(run, folder):
    with pytest.raises(CheckpointError, match="up to step 0"):
        from_hf(folder, RunFolder(run).checkpoints("pretrain"))


@pytest.mark.parametrize(("command", "words"), [
    (lambda run, out: to_hf_command.main([str(run), str(out), "--stage", "nope"]), "one of a_later_stage, pretrain"),
    (lambda run, out: from_hf_command.main([str(out), str(out / "new")]), "no config.json"),
    (lambda run, out: verify_command.main([str(run), str(out)]), "no config.json"),
])
def test_a_mistake_ends_a_converter_with_status_2_and_no_traceback(run, tmp_path, capsys, command, words):
    assert command(run, tmp_path) == 2
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told


def test_a_command_works_from_a_shell(tmp_path, folder):
    done = subprocess.run(
        [sys.executable, "-m", "tools.convert.from_hf", str(folder), str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
    )
    assert done.returncode == 0 and done.stdout == f"written: {tmp_path}/step_00000000\n", done.stderr
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_the_commands_export_verify_and_name_the_worst_tensor(run, tmp_path, capsys):
    out = str(tmp_path / "export")
    assert to_hf_command.main([str(run), out, "--with-copies", "--max-shard-bytes", "200000"]) == 0
    assert "183 tensors" in capsys.readouterr().out
    assert verify_command.main([str(run), out]) == 0
    assert "equal, with the manifests' digests; logits" in capsys.readouterr().out
    change_one(tmp_path / "export", "model.norm.weight", lambda tensor: tensor.add_(0.5))
    assert verify_command.main([str(run), out]) == 2
    assert "model.norm.weight by 0.5" in capsys.readouterr().err


def test_help_answers_without_torch():
    program = "import sys\nfrom tools.convert import to_hf\ntry: to_hf.main(['-h'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("False\n") and "examples:" in done.stdout


def test_the_export_stage_writes_verifies_and_logs(run):
    from posttrain.export import main

    recipe = ExportRecipe(name="t", stage="export", main="posttrain.export", run_folder=str(run), model=SHAPE, platform="host",
                          rotary_base=10_000, **{"from": "a_later_stage"})
    main(recipe)
    read = HFFolder(run / "export")
    assert read.shape == SHAPE
    assert (run / "export/tokenizer.json").is_file()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["export/tensors"] for line in lines] == [181] and lines[0]["export/max_logit_difference"] < 1e-5
    main(recipe)  # again: one line, one folder
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_an_export_that_does_not_verify_is_not_published(run):
    from posttrain import export

    recipe = ExportRecipe(name="t", stage="export", main="posttrain.export", run_folder=str(run), model=SHAPE, platform="host",
                          rotary_base=10_000, verify_tolerance=0.0, **{"from": "pretrain"})
    before = (run / "export/manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"export\.unverified\n.*logits differ"):
        export.main(recipe)
    assert (run / "export/manifest.json").read_bytes() == before


def test_the_export_stage_refuses_another_rotary_base(run):
    from posttrain.export import main

    with pytest.raises(ValueError, match="rotary_base=10000"):
        main(ExportRecipe(name="t", stage="export", main="posttrain.export", run_folder=str(run), model=SHAPE, platform="host",
                          **{"from": "a_later_stage"}))
