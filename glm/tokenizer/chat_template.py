"""GLM-4.5's chat format: as segments with a loss mask for training, and as the Jinja template others load.

    [gMASK]<sop><|system|>\\nS<|user|>\\nQ<|assistant|>\\n<think>R</think>\\nA<|user|>

There is no end-of-turn token: a turn ends where the next role's token stands, so the loss covers that token too.
Reasoning of turns up to the last user message is replaced by an empty pair of think tokens; those turns carry no loss
unless they had no reasoning to lose. A message is {"role": system|user|assistant|tool, "content": str, and for the
assistant optionally "reasoning_content": str, "tool_calls": [{"name", "arguments": {…}} or {"function": {…}}]}.

The text around the tools (TOOLS_BEFORE, TOOLS_AFTER) is the format's own wording, not ours: it is kept word for word so that
prompts are compatible with the released GLM-4.5 models (weights under the MIT licence, repository under Apache-2.0).
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm.errors import DataError
from glm.tokenizer.load import encode_texts, token_id
from glm.tokenizer.special_tokens import (
    ARG_KEY, ARG_VALUE, ASSISTANT, END_ARG_KEY, END_ARG_VALUE, END_THINK, END_TOOL_CALL, END_TOOL_RESPONSE, GMASK, NOTHINK,
    OBSERVATION, SOP, SYSTEM, THINK, TOOL_CALL, TOOL_RESPONSE, USER,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOOLS_BEFORE = """
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
TOOLS_AFTER = """</tools>

For each function call, output the function name and arguments within the following XML format:
<tool_call>{function-name}
<arg_key>{arg-key-1}</arg_key>
<arg_value>{arg-value-1}</arg_value>
<arg_key>{arg-key-2}</arg_key>
<arg_value>{arg-value-2}</arg_value>
...
</tool_call>"""

TEMPLATE = """\
[gMASK]<sop>
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content is iterable and content is not mapping -%}
{%- for part in content -%}{{ part if part is string else part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
{{- '<|system|>""" + TOOLS_BEFORE.replace("\n", "\\n") + """' -}}
{%- for tool in tools -%}{{- tool | tojson(ensure_ascii=False) + '\\n' -}}{%- endfor -%}
{{- '""" + TOOLS_AFTER.replace("\n", "\\n") + """' -}}
{%- endif -%}
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}{%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for message in messages -%}
{%- set content = text_of(message.content) -%}
{%- if message.role == 'system' -%}{{- '<|system|>\\n' + content -}}
{%- elif message.role == 'user' -%}
{{- '<|user|>\\n' + content -}}
{%- if enable_thinking is defined and not enable_thinking and not content.endswith('/nothink') -%}{{- '/nothink' -}}{%- endif -%}
{%- elif message.role == 'assistant' -%}
{%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' -%}
{%- if message.reasoning_content is not string and '</think>' in content -%}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1] -%}
{%- set content = content.split('</think>')[-1] -%}
{%- endif -%}
{{- '<|assistant|>\\n<think>' + (reasoning.strip() if loop.index0 > last.user else '') + '</think>' -}}
{%- if content.strip() -%}{{- '\\n' + content.strip() -}}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- set call = call.function or call -%}
{{- '\\n<tool_call>' + call.name + '\\n' -}}
{%- for key, value in call.arguments.items() -%}
{{- '<arg_key>' + key + '</arg_key>\\n<arg_value>' -}}
{{- value if value is string else value | tojson(ensure_ascii=False) -}}{{- '</arg_value>\\n' -}}
{%- endfor -%}
{{- '</tool_call>' -}}
{%- endfor -%}
{%- elif message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|observation|>' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}{%- if enable_thinking is defined and not enable_thinking -%}{{- '\\n<think></think>' -}}{%- endif -%}
{%- endif -%}
"""


@dataclass(frozen=True)
class Segment:
    """A control token or plain text; ``learned`` if the assistant writes it."""

    text: str
    control: bool = False
    learned: bool = False


def _text_of(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else part.get("text", "") for part in content)
    return ""


def _tool_text_segments(text: str, learned: bool) -> list[Segment]:
    """The instructions on tools show control tokens; a tokenizer of the rendered template reads them as such."""
    segments, rest = [], text
    markers = (TOOL_CALL, END_TOOL_CALL, ARG_KEY, END_ARG_KEY, ARG_VALUE, END_ARG_VALUE)
    while rest:
        found = min(((rest.find(marker), marker) for marker in markers if marker in rest), default=None)
        if found is None:
            return [*segments, Segment(rest, learned=learned)]
        at, marker = found
        segments += [Segment(rest[:at], learned=learned)] * bool(at) + [Segment(marker, True, learned)]
        rest = rest[at + len(marker) :]
    return segments


def _assistant_segments(message: dict, keeps_reasoning: bool, generated_think: bool) -> tuple[list[Segment], bool]:
    """The turn after its role token, and whether the loss covers it. ``generated_think``: the think tokens are the model's."""
    content, reasoning = _text_of(message.get("content")), message.get("reasoning_content")
    if not isinstance(reasoning, str):
        reasoning = ""
        if END_THINK in content:
            reasoning = content.split(END_THINK)[0].split(THINK)[-1]
            content = content.split(END_THINK)[-1]
    reasoning, content = reasoning.strip(), content.strip()
    learned = keeps_reasoning or not reasoning
    shown = reasoning if keeps_reasoning else ""
    think_learned = learned and generated_think
    segments = [Segment("\n", learned=think_learned), Segment(THINK, True, think_learned)]
    segments += [Segment(shown, learned=learned)] * bool(shown)
    segments += [Segment(END_THINK, True, think_learned)]
    if content:
        segments.append(Segment("\n" + content, learned=learned))
    for call in message.get("tool_calls") or []:
        call = call.get("function") or call
        segments += [Segment("\n", learned=learned), Segment(TOOL_CALL, True, learned)]
        segments += [Segment(call["name"] + "\n", learned=learned)]
        for key, value in call["arguments"].items():
            value = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            segments += [
                Segment(ARG_KEY, True, learned), Segment(key, learned=learned), Segment(END_ARG_KEY, True, learned),
                Segment("\n", learned=learned), Segment(ARG_VALUE, True, learned), Segment(value, learned=learned),
                Segment(END_ARG_VALUE, True, learned), Segment("\n", learned=learned),
            ]
        segments.append(Segment(END_TOOL_CALL, True, learned))
    return segments, learned


def render(messages: list[dict], *, tools: list[dict] | None = None, enable_thinking: bool = True,
           add_generation_prompt: bool = False, close: bool = False) -> list[Segment]:
    """The dialogue as segments; their texts joined are what the Jinja template renders.

    ``close`` ends a last assistant turn with the token of the role that follows: <|observation|> after a tool call, else
    <|user|>. Without thinking the empty think pair is part of the prompt, hence not learned. Raises DataError.
    """
    segments = [Segment(GMASK, True), Segment(SOP, True)]
    if tools:
        listed = "".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools)
        segments += [Segment(SYSTEM, True), Segment(TOOLS_BEFORE + listed), *_tool_text_segments(TOOLS_AFTER, False)]
    last_user = max((i for i, message in enumerate(messages) if message.get("role") == "user"), default=-1)
    written = False  # whether the message before is an assistant turn under the loss, which then covers the next role token
    for i, message in enumerate(messages):
        role, content = message.get("role"), _text_of(message.get("content"))
        learned_end, written = written, False
        if role == "system":
            segments += [Segment(SYSTEM, True, learned_end), Segment("\n" + content)]
        elif role == "user":
            nothink = not enable_thinking and not content.endswith(NOTHINK)
            asked_nothink = content.endswith(NOTHINK)
            content = content.removesuffix(NOTHINK)
            segments += [Segment(USER, True, learned_end), Segment("\n" + content)]
            segments += [Segment(NOTHINK, True)] * (nothink or asked_nothink)
        elif role == "assistant":
            turn, written = _assistant_segments(message, i > last_user, enable_thinking)
            segments += [Segment(ASSISTANT, True, learned_end), *turn]
        elif role == "tool":
            if i == 0 or messages[i - 1].get("role") != "tool":
                segments.append(Segment(OBSERVATION, True, learned_end))
            segments += [
                Segment("\n"), Segment(TOOL_RESPONSE, True), Segment("\n" + content + "\n"), Segment(END_TOOL_RESPONSE, True),
            ]
        else:
            raise DataError(
                f"message {i} of a dialogue", f"role {role!r}", "system, user, assistant or tool", "correct the dialogue"
            )
    if close and messages and messages[-1]["role"] == "assistant":
        segments.append(Segment(OBSERVATION if messages[-1].get("tool_calls") else USER, True, written))
    if add_generation_prompt:
        segments.append(Segment(ASSISTANT, True))
        if not enable_thinking:
            segments += [Segment("\n"), Segment(THINK, True), Segment(END_THINK, True)]
    return segments


def render_text(messages: list[dict], **options) -> str:
    """``render`` as one string, as the Jinja template gives it."""
    return "".join(segment.text for segment in render(messages, **options))


def _joined(segments: list[Segment]) -> list[Segment]:
    """Neighbouring plain texts made one, as a tokenizer sees them."""
    joined: list[Segment] = []
    for segment in segments:
        if joined and not segment.control and not joined[-1].control and joined[-1].learned == segment.learned:
            joined[-1] = Segment(joined[-1].text + segment.text, False, segment.learned)
        else:
            joined.append(segment)
    return joined


def encode_segments(tokenizer: "PreTrainedTokenizerFast", dialogues: list[list[Segment]]) -> list[tuple[list[int], list[int]]]:
    """(ids, loss mask) of each list of segments. Text never becomes a control token, whatever it says."""
    dialogues = [_joined(segments) for segments in dialogues]
    texts = sorted({segment.text for segments in dialogues for segment in segments if not segment.control})
    ids_of = dict(zip(texts, encode_texts(tokenizer, texts)))
    controls = {segment.text for segments in dialogues for segment in segments if segment.control}
    control_ids = {token: [token_id(tokenizer, token)] for token in controls}
    encoded = []
    for segments in dialogues:
        ids: list[int] = []
        mask: list[int] = []
        for segment in segments:
            piece = control_ids[segment.text] if segment.control else ids_of[segment.text]
            ids += piece
            mask += [int(segment.learned)] * len(piece)
        encoded.append((ids, mask))
    return encoded


def encode_dialogue(tokenizer: "PreTrainedTokenizerFast", messages: list[dict], *, tools: list[dict] | None = None,
                    enable_thinking: bool = True, add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
    """(ids, loss mask), the mask 1 on what the assistant writes, the role token that ends its turn included.

    A dialogue that ends with the assistant is closed with that role token. With ``add_generation_prompt`` it is a prompt.
    """
    segments = render(
        messages, tools=tools, enable_thinking=enable_thinking, add_generation_prompt=add_generation_prompt,
        close=not add_generation_prompt,
    )
    return encode_segments(tokenizer, [segments])[0]
