import json
import random

import numpy as np
import pytest

from glm.data import encoding
from glm.data.batches import manifest_path
from glm.data.encoding import encode_stream
from glm.data.prepare import prepare
from glm.data.tokenized import open_corpus
from glm.recipe.sections import Source
from glm.tokenizer import load_tokenizer
from glm.tokenizer.encode import text_encoder
from glm.tokenizer.load import encode_texts
from glm.tokenizer.special_tokens import CONTROL_TOKENS


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    return [(f"text {i}", " ".join(rng.choices(["def", "naïve", "汉字", "<think>", "x = 1\n"], k=rng.randint(1, 60)))) for i in range(300)]


def test_two_processes_encode_what_one_does_in_the_same_order(tokenizer_folder, texts, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_BYTES", 4000)
    monkeypatch.setattr(encoding, "ALONE_BYTES", 8000)
    encoder = text_encoder(tokenizer_folder)
    one, two = (list(encode_stream(texts, encoder, workers)) for workers in (1, 2))
    assert [encoded.key for encoded in two] == [key for key, _ in texts]
    assert all((a.ids == b.ids).all() and a.control_strings == b.control_strings for a, b in zip(one, two, strict=True))
    reference = encode_texts(load_tokenizer(tokenizer_folder), [text for _, text in texts])
    assert [encoded.ids[:-1].tolist() for encoded in one] == reference


def test_control_tokens_spelled_out_in_documents_are_counted_and_stay_text(tiny_stages, run_folder, tmp_path):
    folder = tmp_path / "library"
    folder.mkdir()
    for i, token in enumerate(CONTROL_TOKENS * 3):
        (folder / f"{i:03}.txt").write_text(f"document {i} says {token} twice: {token}")
    recipe = tiny_stages["pretrain_general"]
    data = recipe.data.model_copy(update={"documents": str(folder), "sources": {"library": Source(corpus="prose", share=1)}})
    recipe = recipe.model_copy(update={"data": data})
    prepare(recipe, run_folder)
    report = json.loads((run_folder.data / "report.json").read_text())[recipe.stage]["library"]
    assert report["control_strings"] == 6 * len(CONTROL_TOKENS)
    corpus = open_corpus(run_folder.data, json.loads(manifest_path(run_folder, recipe.stage).read_text())["sources"]["library"])
    controls = set(load_tokenizer(run_folder.tokenizer).convert_tokens_to_ids(list(CONTROL_TOKENS)))
    for shard in corpus.shards:
        places = np.flatnonzero(np.isin(shard.tokens, list(controls)))
        assert len(places) == 3 * len(CONTROL_TOKENS), "one <|endoftext|> a document, and no other"
        assert set(places) <= set(shard.offsets[1:] - 1), "at its end; a document cut for validation has one end without"
