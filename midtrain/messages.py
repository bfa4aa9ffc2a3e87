"""Messages as people store them, in the form ``glm.tokenizer.chat_template`` renders; what cannot be rendered gives a reason."""

import json
from collections.abc import Mapping

ROLES = ("system", "user", "assistant", "tool")


class Unusable(ValueError):
    """Says why a dialogue cannot be trained on."""


def read_messages(messages: object) -> list[dict]:
    """Checked and with the arguments of tool calls as dicts (OpenAI writes them as a string of JSON). Raises Unusable."""
    if isinstance(messages, str):
        messages = _json(messages, "messages that are not JSON")
    if not isinstance(messages, list) or not messages:
        raise Unusable("no messages")
    read, open_calls = [], 0
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise Unusable("a message of an unknown role")
        one = {"role": message["role"], "content": message.get("content") or ""}
        if not isinstance(one["content"], str | list):
            raise Unusable("content that is neither text nor a list of parts")
        if one["role"] == "assistant":
            if isinstance(message.get("reasoning_content"), str):
                one["reasoning_content"] = message["reasoning_content"]
            if message.get("tool_calls"):
                one["tool_calls"] = [_call(call) for call in message["tool_calls"]]
            elif not one["content"] and not one.get("reasoning_content"):
                raise Unusable("an empty turn of the assistant")
            open_calls = len(one.get("tool_calls", ()))
        elif one["role"] == "tool":
            open_calls -= 1
            if open_calls < 0:
                raise Unusable("a tool's result without its call")
        read.append(one)
    if read[-1]["role"] != "assistant":
        raise Unusable("the last message is not the assistant's")
    return read


def read_tools(tools: object) -> list[dict] | None:
    if isinstance(tools, str):
        tools = _json(tools, "tools that are not JSON")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise Unusable("tools that are not a list of objects")
    return list(tools) if tools else None


def _call(call: object) -> dict:
    function = call.get("function") or call if isinstance(call, Mapping) else {}
    name, arguments = function.get("name"), function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", "a tool call whose arguments are not JSON")
    if not isinstance(name, str) or not isinstance(arguments if arguments is not None else {}, Mapping):
        raise Unusable("a tool call without a name or with arguments that are no object")
    return {"name": name, "arguments": dict(arguments or {})}


def _json(text: str, what: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(what) from error
