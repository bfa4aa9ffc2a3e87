"""Dialogues through the served chat template."""

import asyncio
import io
import json
import sys

import pytest
from rich.console import Console

from glm.errors import CheckpointError
from glm.inference.chat import _converse, find_model, sample_dialogues, stored_dtype


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


def test_a_turn_too_long_for_the_model_is_forgotten_and_the_conversation_goes_on(server, loaded, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("too long " * 300 + "\nhello\n/quit\n"))
    printed = io.StringIO()
    asyncio.run(_converse(server, Console(file=printed, width=200), 4, 0.0))
    refused, _, after = printed.getvalue().partition("that turn is forgotten")
    assert "status 400" in refused and "glm  " not in refused
    assert "glm  " in after and "status" not in after
