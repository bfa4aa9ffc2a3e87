"""How fast the steps of the prepare stage are on one core: ``python benchmarks/prepare.py [TOKENIZER_FOLDER]`` prints docs/data.md's table."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from glm.data.documents import documents
from glm.recipe.raw import Deduplicate, FillInTheMiddle
from glm.tokenizer.encode import text_encoder
from pretrain.clean import clean
from pretrain.fill_in_the_middle import choose
from pretrain.heuristics import code_score, prose_score
from pretrain.language import identify
from pretrain.signatures import text_signature


def main(arguments: list[str]) -> None:
    prose, code = ([text for _, text in documents(corpus, None, 1, 0)] for corpus in ("prose", "code"))
    rules, fim = Deduplicate(), FillInTheMiddle()
    steps: list[tuple[str, Callable[[str], object], list[str]]] = [
        ("clean", clean, prose + code), ("language", identify, prose + code), ("score prose", prose_score, prose), ("score code", code_score, code),
        ("exact and MinHash", lambda text: text_signature(text, rules), prose + code),
        ("fill in the middle", lambda text: choose(text, text[:50], 0, fim), prose + code),
    ]
    if arguments:
        encoder = text_encoder(Path(arguments[0]))
        steps.append(("encode", lambda text: encoder.encode([text]), prose + code))
    for name, step, texts in steps:
        step("the first call loads models and libraries")
        start = time.process_time()
        for text in texts:
            step(text)
        seconds, size = time.process_time() - start, sum(len(text.encode()) for text in texts)
        print(f"{name:20} {len(texts) / seconds:10,.0f} documents/s {size / 1e6 / seconds:8.1f} MB/s")


if __name__ == "__main__":
    main(sys.argv[1:])
