"""Fill-in-the-middle: a document cut at two characters, the middle told last (Bavarian et al. 2022), with GLM's tokens.

PSM  <|code_prefix|> prefix <|code_suffix|> suffix <|code_middle|> middle
SPM  <|code_prefix|> <|code_suffix|> suffix <|code_middle|> prefix middle     (their variant 2: prefix and middle stay together)

Which documents, which form and where the cuts fall are a function of seed and document alone. The pieces are text and are
encoded as text, the control tokens stand between them as ids: nothing in a document can be taken for one, none can be cut.
"""

import random
from dataclasses import dataclass

from glm.recipe.raw import FillInTheMiddle
from glm.tokenizer.special_tokens import CODE_MIDDLE, CODE_PREFIX, CODE_SUFFIX

SHORTEST = 3
"""Characters; each part gets at least one."""


@dataclass(frozen=True)
class Cut:
    """A document to be rearranged. Characters [first, last) are the middle."""

    first: int
    last: int
    suffix_first: bool

    def parts(self, text: str) -> list[tuple[str, str]]:
        """(control token, text after it) in order."""
        prefix, middle, suffix = text[: self.first], text[self.first : self.last], text[self.last :]
        if self.suffix_first:
            return [(CODE_PREFIX, ""), (CODE_SUFFIX, suffix), (CODE_MIDDLE, prefix + middle)]
        return [(CODE_PREFIX, prefix), (CODE_SUFFIX, suffix), (CODE_MIDDLE, middle)]


def choose(text: str, document: str, seed: int, fim: FillInTheMiddle) -> Cut | None:
    """How this document is rearranged; None: it stays as it is. ``document``: what tells it from all others."""
    drawn = random.Random(f"fill-in-the-middle {seed} {document}")
    chosen, suffix_first = drawn.random() < fim.rate, drawn.random() < fim.suffix_first
    if not chosen or len(text) < SHORTEST:
        return None
    first, last = sorted(drawn.sample(range(1, len(text)), 2))
    return Cut(first, last, suffix_first)
