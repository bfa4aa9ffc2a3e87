"""Agents' trajectories through the chat template, tools and their results included."""

from glm.tokenizer.chat_template import Segment, render
from midtrain.messages import Unusable, read_messages, read_tools


def segments_of(record: dict) -> tuple[list[Segment], str]:
    """(what is tokenized, the task it is about). Raises Unusable."""
    messages = read_messages(record.get("messages"))
    tools = read_tools(record.get("tools"))
    if not any(message.get("tool_calls") for message in messages):
        raise Unusable("no tool is called")
    task = next((str(message["content"]) for message in messages if message["role"] == "user"), "")
    return render(messages, tools=tools, close=True), task
