"""GLM-4.5's control tokens, in GLM's order. They take the last ids of the vocabulary."""

END_OF_TEXT = "<|endoftext|>"
GMASK, SOP = "[gMASK]", "<sop>"
SYSTEM, USER, ASSISTANT, OBSERVATION = "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"
THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
TOOL_RESPONSE, END_TOOL_RESPONSE = "<tool_response>", "</tool_response>"
ARG_KEY, END_ARG_KEY = "<arg_key>", "</arg_key>"
ARG_VALUE, END_ARG_VALUE = "<arg_value>", "</arg_value>"
NOTHINK = "/nothink"
CODE_PREFIX, CODE_MIDDLE, CODE_SUFFIX = "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>"

SPECIAL_TOKENS: tuple[str, ...] = (
    END_OF_TEXT, "[MASK]", GMASK, "[sMASK]", SOP, "<eop>", SYSTEM, USER, ASSISTANT, OBSERVATION,
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    "<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>", "<|end_of_transcription|>",
    CODE_PREFIX, CODE_MIDDLE, CODE_SUFFIX,
)
"""Hidden when text is decoded with ``skip_special_tokens``."""

VISIBLE_TOKENS: tuple[str, ...] = (
    THINK, END_THINK, TOOL_CALL, END_TOOL_CALL, TOOL_RESPONSE, END_TOOL_RESPONSE,
    ARG_KEY, END_ARG_KEY, ARG_VALUE, END_ARG_VALUE, NOTHINK,
)
"""Single ids too, but part of the decoded text: parsers of thoughts and tool calls read them."""

CONTROL_TOKENS: tuple[str, ...] = SPECIAL_TOKENS + VISIBLE_TOKENS

STOP_TOKENS: tuple[str, ...] = (END_OF_TEXT, USER, OBSERVATION)
"""GLM has no end-of-turn token: a reply ends where the next role begins."""
