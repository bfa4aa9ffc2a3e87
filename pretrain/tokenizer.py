"""Stage ``pretrain.tokenizer``: a sample of the mixture to RUN/tokenizer."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from glm.checkpoint.run_folder import RunFolder
from glm.data.documents import dialogues, documents
from glm.recipe.mixture import mixture_of
from glm.recipe.schema import TokenizerRecipe
from glm.recipe.sections import Data
from glm.tokenizer.train import train_tokenizer


def sample_texts(data: Data, sample_bytes: int, seed: int) -> Iterator[str]:
    """Each source's share of ``sample_bytes``; less where a corpus is smaller."""
    for source in mixture_of(data).sources.values():
        left = source.share * sample_bytes
        for text in _corpus_texts(source.corpus, data, seed):
            if left <= 0:
                break
            yield text
            left -= len(text.encode())


def _corpus_texts(corpus: str, data: Data, seed: int) -> Iterator[str]:
    if corpus == "dialogues":
        for _, messages, _ in dialogues(data.problems, seed):
            for message in messages:
                yield message.get("reasoning_content", "")
                yield message["content"]
    else:
        yield from (text for _, text in documents(corpus, data.documents, data.problems, seed, mixed=True))


def main(recipe: TokenizerRecipe) -> None:
    """Raises DataError for unreadable or too little text. A tokenizer that is there is replaced only by a whole new one."""
    folder = RunFolder(Path(recipe.run_folder))
    start = time.perf_counter()
    draft = folder.tokenizer.with_name(f".tokenizer.{os.getpid()}.tmp")
    former = draft.with_suffix(".old")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        train_tokenizer(
            sample_texts(recipe.data, recipe.tokenizer.sample_bytes, recipe.seed), recipe.tokenizer.vocab_size, draft
        )
        if folder.tokenizer.exists():  # a folder is not replaced in one step, so no half-deleted one stands there meanwhile
            folder.tokenizer.replace(former)
        draft.replace(folder.tokenizer)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)
    print(f"{recipe.stage}: {recipe.tokenizer.vocab_size} tokens, {time.perf_counter() - start:.1f} s", flush=True)
