"""Dialogues through the served chat template."""

import json

import pytest

from glm.errors import CheckpointError
from glm.inference.chat import find_model, sample_dialogues, stored_dtype


def test_dialogues_come_back_in_order_and_thinking_can_be_turned_off(ask, loaded):
    prompts = ["What is 2 + 3?", "hello"]
    thought = ask(lambda client: sample_dialogues(client, prompts, thinking=True, max_new_tokens=12))
    plain = ask(lambda client: sample_dialogues(client, prompts, thinking=False, max_new_tokens=12))
    assert [dialogue.prompt for dialogue in thought] == prompts
    assert all(dialogue.reply for dialogue in (*thought, *plain))
    assert [dialogue.reply for dialogue in thought] != [dialogue.reply for dialogue in plain]  # another prompt was rendered
    assert all(dialogue.reasoning == "" for dialogue in plain)


def test_a_run_folder_leads_to_its_export_and_its_platform(tmp_path, model_folder):
    assert find_model(model_folder) == (model_folder, "host")
    with pytest.raises(CheckpointError, match="finish the run first"):
        find_model(tmp_path)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    (tmp_path / "stages" / "export").mkdir(parents=True)
    (tmp_path / "stages" / "export" / "recipe.json").write_text(json.dumps({"platform": "cuda"}))
    assert find_model(tmp_path) == (tmp_path / "export", "cuda")
    assert stored_dtype(tmp_path / "export") == "bfloat16"
