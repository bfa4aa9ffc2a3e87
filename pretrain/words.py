"""Words of a text in any script: a CJK character is a word, elsewhere letters and digits that stand together."""

import re
import unicodedata

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+(?:['\u2019][^\W\d_]+)?")
CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


def words_of(text: str) -> list[str]:
    return WORD.findall(text)


def normalised_words(text: str) -> list[str]:
    """What two documents that differ only in case, Unicode form, white space and punctuation have in common."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return WORD.findall(text.lower())
