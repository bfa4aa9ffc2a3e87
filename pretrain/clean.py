"""Makes raw text fit to be read: newlines as one character, no control characters."""

import re

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ufffe\uffff]")
"""All that print nothing, but tab and newline; byte order marks."""


def clean(text: str) -> str:
    """The text without control characters, carriage returns, and blank lines around it; indentation stays. Clean text stays as it is."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = CONTROL_CHARACTERS.sub("", text)
    first_line = len(text) - len(text.lstrip())
    return text[text.rfind("\n", 0, first_line) + 1 :].rstrip()
