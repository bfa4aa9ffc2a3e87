import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm.errors import DataError
from glm.tokenizer import encode_dialogue, render_text, token_id
from glm.tokenizer.special_tokens import CONTROL_TOKENS

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"properties": {"where": {"type": "string"}}}}}]
ASK = {"role": "user", "content": "What is 1+1?"}
CALL = {
    "role": "assistant", "reasoning_content": "need to look", "content": "Looking.",
    "tool_calls": [
        {"function": {"name": "look", "arguments": {"where": "here", "times": 2, "deep": {"é": [True, None]}}}},
        {"name": "wait", "arguments": {}},
    ],
}
RESULT = {"role": "tool", "content": "it is 2"}
ANSWER = {"role": "assistant", "reasoning_content": "1+1=2", "content": "2"}

DIALOGUES = {
    "question": [ASK],
    "system": [{"role": "system", "content": "Be brief."}, ASK],
    "answer": [ASK, ANSWER],
    "two turns": [ASK, ANSWER, {"role": "user", "content": "And 2+2?"}, {"role": "assistant", "content": "4"}],
    "thought inside the content": [ASK, {"role": "assistant", "content": "<think>\n1+1=2\n</think>\n\n2"}],
    "tool loop": [ASK, CALL, RESULT, RESULT, ANSWER, {"role": "user", "content": "Thanks"}],
    "tool loop that goes on": [ASK, CALL, RESULT],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}],
    "spaces": [{"role": "user", "content": "  x \n"}, {"role": "assistant", "content": "\n y \n", "reasoning_content": " z "}],
    "no content": [ASK, {"role": "assistant", "content": "", "tool_calls": CALL["tool_calls"]}, RESULT],
    "already asked not to think": [{"role": "user", "content": "What is 1+1?/nothink"}],
}


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "nothink"])
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", ""])
@pytest.mark.parametrize("name", DIALOGUES)
def test_text_and_ids_are_those_of_the_jinja_template(tokenizer, name, prompt, thinking, tools):
    messages = DIALOGUES[name]
    options = {"enable_thinking": thinking, "add_generation_prompt": prompt}
    expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
    assert render_text(messages, tools=tools, **options) == expected
    expected_ids = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False, **options)
    ids, mask = encode_dialogue(tokenizer, messages, tools=tools, **options)
    closed = not prompt and messages[-1]["role"] == "assistant"
    assert ids[: len(ids) - closed] == expected_ids and len(mask) == len(ids)
    assert not closed or tokenizer.convert_ids_to_tokens(ids[-1]) in ("<|user|>", "<|observation|>")


def test_the_text_is_glms():
    assert render_text([ASK, ANSWER]) == "[gMASK]<sop><|user|>\nWhat is 1+1?<|assistant|>\n<think>1+1=2</think>\n2"
    assert render_text([ASK], add_generation_prompt=True) == "[gMASK]<sop><|user|>\nWhat is 1+1?<|assistant|>"
    assert render_text([ASK], add_generation_prompt=True, enable_thinking=False) == (
        "[gMASK]<sop><|user|>\nWhat is 1+1?/nothink<|assistant|>\n<think></think>")
    two_turns = render_text(DIALOGUES["two turns"])
    assert two_turns.endswith("<|assistant|>\n<think></think>\n2<|user|>\nAnd 2+2?<|assistant|>\n<think></think>\n4")
    pairs = (("where", "here"), ("times", "2"))
    called = "<tool_call>look\n" + "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in pairs)
    assert called in render_text(DIALOGUES["tool loop that goes on"])
    assert render_text([ASK, CALL, RESULT, RESULT]).count("<|observation|>") == 1
    listed = render_text([ASK], tools=TOOLS)
    assert listed.startswith("[gMASK]<sop><|system|>\n# Tools\n\n") and json.dumps(TOOLS[0]) in listed


def learned_text(tokenizer, messages, **options):
    ids, mask = encode_dialogue(tokenizer, messages, **options)
    return tokenizer.decode([index for index, learned in zip(ids, mask) if learned])


def test_the_loss_covers_what_the_assistant_writes_and_the_role_that_follows(tokenizer):
    assert learned_text(tokenizer, [ASK, ANSWER]) == "\n<think>1+1=2</think>\n2<|user|>"
    assert learned_text(tokenizer, [ASK, ANSWER], enable_thinking=False).endswith("2<|user|>")
    assert learned_text(tokenizer, [ASK, {"role": "assistant", "content": "2"}], enable_thinking=False) == "\n2<|user|>"


def test_a_tool_call_ends_with_the_observation(tokenizer):
    learned = learned_text(tokenizer, [ASK, CALL, RESULT, ANSWER])
    assert learned.count("<|observation|>") == 1 and learned.index("</tool_call><|observation|>") > 0
    assert "it is 2" not in learned and learned.endswith("<|user|>")
    assert learned_text(tokenizer, [ASK, CALL]).endswith("</tool_call><|observation|>")


def test_a_turn_whose_thought_was_dropped_is_not_learned(tokenizer):
    more = [{"role": "user", "content": "And 3+4?"}, {"role": "assistant", "content": "7"}]
    learned = learned_text(tokenizer, [ASK, ANSWER, *more])
    assert learned == "\n<think></think>\n7<|user|>"


def test_a_prompt_carries_no_loss(tokenizer):
    assert not any(encode_dialogue(tokenizer, [ASK], add_generation_prompt=True)[1])


@given(content=st.lists(st.sampled_from([*CONTROL_TOKENS, "a", " ", "\n", "x y"]), max_size=6).map("".join))
def test_no_text_of_a_user_a_tool_or_a_system_forges_a_control_token(tokenizer, content):
    content += "."  # a /nothink at the very end is the user's own switch
    controls = {token_id(tokenizer, token) for token in CONTROL_TOKENS}

    def control_ids(text):
        messages = [*({"role": role, "content": text} for role in ("system", "user")), CALL, {"role": "tool", "content": text}]
        return [index for index in encode_dialogue(tokenizer, messages)[0] if index in controls]

    assert control_ids(content) == control_ids("harmless")


def test_an_unknown_role_is_an_error(tokenizer):
    with pytest.raises(DataError, match="message 0 of a dialogue(.|\n)*'robot'"):
        encode_dialogue(tokenizer, [{"role": "robot", "content": "x"}])
