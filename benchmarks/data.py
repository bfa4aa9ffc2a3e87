"""What data costs on this machine beside the peers, in CPU-seconds: tokenizing and writing, packing, and reading rows.

    python benchmarks/data.py [--megabytes 16] [--repeats 3]

Text of the Python installation as jsonl, a byte-level BPE of 32,000 tokens in GLM-4.5's form trained on it, and synthetic corpora
with log-normal lengths. Peers: Hugging Face's tokenizers, the loop of Megatron's tools/preprocess_data.py (transformers' tokenizer,
megatron-core's IndexedDatasetBuilder; in one process, without its start and without what passing documents between its processes
costs), and megatron-core's GPTDataset on the same tokens. Each repeat runs all in turn; the best of each counts.
Prints Markdown; docs/benchmarks.md holds the output of a day.
"""

import argparse
import json
import os
import platform
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from glm.checkpoint.run_folder import write_json
from glm.data.best_fit import best_fit, cut_to_pieces
from glm.data.blocks import Blocks
from glm.data.documents import TEXT_CORPORA, user_documents
from glm.data.encoding import encode_stream
from glm.data.packing import PackedRows, TruncatedRows
from glm.data.tokenized import Document, open_corpus, write_corpus
from glm.tokenizer.encode import text_encoder
from glm.tokenizer.fast import CL100K
from glm.tokenizer.special_tokens import CONTROL_TOKENS, END_OF_TEXT

VOCABULARY = 32_000
LENGTHS = (4096, 32_768, 131_072)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--megabytes", type=float, default=16, help="text to tokenize (default: 16)")
    made.add_argument("--repeats", type=int, default=3, help="the best of so many runs counts (default: 3)")
    given = made.parse_args()
    warnings.filterwarnings("ignore")
    packages = ("tiktoken", "tokenizers", "transformers", "megatron-core", "numba", "numpy")
    print(f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in packages)
          + f"; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start\n")
    with tempfile.TemporaryDirectory() as folder:
        tokenizing(Path(folder), given.megabytes, given.repeats)
        packing(given.repeats)
        reading(Path(folder), given.repeats)


def best_of(repeats: int, tasks: dict) -> dict[str, float]:
    """Least CPU-seconds of each task, all run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            start = time.process_time()
            task()
            seconds[name].append(time.process_time() - start)
    return {name: min(times) for name, times in seconds.items()}


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    print(f"{title}\n\n| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    print("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")


def make_text(path: Path, size: float) -> list[str]:
    texts = []
    for corpus in TEXT_CORPORA.values():
        taken = 0
        for _, text in corpus():
            texts.append(text)
            taken += len(text.encode())
            if taken > size / len(TEXT_CORPORA):
                break
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return texts


def make_tokenizer(folder: Path, texts: list[str]) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Split(Regex(CL100K), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(parts), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT})


def megatron_preprocess(source: Path, prefix: Path, tokenizer) -> None:
    """tools/preprocess_data.py: read a line, json, the tokenizer's ids and <|endoftext|>, add_document."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(len(tokenizer)))
    end = tokenizer.eos_token_id
    with source.open(encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer(json.loads(line)["text"]).input_ids
            builder.add_document([*ids, end], [len(ids) + 1])
    builder.finalize(f"{prefix}.idx")


def tokenizing(folder: Path, megabytes: float, repeats: int) -> None:
    from transformers import PreTrainedTokenizerFast

    source = folder / "text.jsonl"
    texts = make_text(source, megabytes * 1e6)
    make_tokenizer(folder / "tokenizer", texts)
    size = sum(len(text.encode()) for text in texts)
    encoder = text_encoder(folder / "tokenizer")
    reference = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True)

    def ours() -> None:
        documents = (Document(encoded.ids) for encoded in encode_stream(user_documents(source), encoder, workers=1))
        write_corpus(folder, "ours", documents, vocab_size=len(reference), facts={})

    encoder.encode(["warm"])
    seconds = best_of(repeats, {
        "glm: read, encode, write with digests": ours,
        "Megatron's preprocess loop": lambda: megatron_preprocess(source, folder / "megatron", reference),
        "glm: encode alone": lambda: encoder.encode(texts),
        "tokenizers: encode_batch_fast alone": lambda: encoder.plain.encode_batch_fast(texts, add_special_tokens=False),
    })
    slow = seconds["Megatron's preprocess loop"]
    table(
        f"Tokenizing {size / 1e6:.1f} MB, {len(texts):,} documents, vocabulary {len(reference):,}", ["", "MB a CPU-second", "beside Megatron's"],
        [[name, f"{size / 1e6 / taken:.1f}", f"{slow / taken:.1f}"] for name, taken in seconds.items()],
    )
    theirs = encoder.plain.encode_batch_fast(texts, add_special_tokens=False)
    equal = all(ids.tolist() == encoding.ids for ids, encoding in zip(encoder.encode(texts), theirs, strict=True))
    written = open_corpus(folder, "ours")
    print(f"Ids equal those of tokenizers without control tokens, all {written.num_tokens:,}: {'yes' if equal else 'NO'}\n")


def lengths_of_documents(tokens: int) -> np.ndarray:
    """Log-normal, as those of web text: half are shorter than 665 tokens, the mean is 1,100."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(6.5, 1.0, size=int(tokens / 1050) + 1000)).astype(np.int64)
    return lengths[: int(np.searchsorted(np.cumsum(lengths), tokens))]


def packing(repeats: int) -> None:
    rows = []
    for capacity in LENGTHS:
        lengths = lengths_of_documents(min(8192 * capacity, 2**28))
        best_fit(np.array([1, 2]), 4)  # compiled
        taken = best_of(repeats, {"pack": lambda: best_fit(cut_to_pieces(lengths, capacity)[2], capacity)})["pack"]
        document, _, piece_lengths = cut_to_pieces(lengths, capacity)
        row_of, number = best_fit(piece_lengths, capacity)
        in_one_row = np.bincount(np.unique(np.stack([document, row_of]), axis=1)[0], minlength=len(lengths)) == 1
        ends = np.cumsum(lengths)
        cut = np.mean((ends - 1) // capacity != (ends - lengths) // capacity)
        rows.append([f"{capacity:,}", f"{len(lengths):,}", f"{len(lengths) / taken:,.0f}", f"{lengths.sum() / (number * capacity):.3%}", f"{1 - in_one_row.mean():.2%}", f"{cut:.2%}"])
    table("Best-fit packing, one window", ["row", "documents", "documents a CPU-second", "filled", "documents cut", "cut by concatenation"], rows)


def gpt_dataset(prefix: Path, documents: int, length: int, samples: int, cache: Path):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=length, blend=([str(prefix)], None), split="100,0,0", path_to_cache=str(cache),
        tokenizer=SimpleNamespace(eod=0, pad=VOCABULARY + 1, vocab_size=VOCABULARY, unique_identifiers={"name": "none"}), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False,
    )
    return GPTDataset(IndexedDataset(str(prefix)), str(prefix), np.arange(documents, dtype=np.int32), samples, Split.train, config)


def reading(folder: Path, repeats: int) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    lengths = lengths_of_documents(2**27)
    tokens = np.random.default_rng(1).integers(1, VOCABULARY, int(lengths.sum()), dtype=np.uint16)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    write_corpus(folder, "synthetic", (Document(tokens[a:b]) for a, b in zip(starts, starts[1:])), vocab_size=VOCABULARY, facts={})
    builder = IndexedDatasetBuilder(str(folder / "synthetic_megatron.bin"), dtype=np.uint16)
    for a, b in zip(starts, starts[1:]):
        builder.add_document(tokens[a:b], [b - a])
    builder.finalize(str(folder / "synthetic_megatron.idx"))
    corpus = open_corpus(folder, "synthetic")
    blocks = Blocks(corpus, held_out=False)
    rows = []
    for length in (LENGTHS[0], LENGTHS[-1]):
        count = min(int(0.9 * blocks.num_tokens // length), 2**26 // length)
        truncated = TruncatedRows(blocks, length, 0, "synthetic", 0)
        packed = PackedRows(blocks, length, "synthetic", False, 0)
        megatron = gpt_dataset(folder / "synthetic_megatron", len(lengths), length, count, folder / "cache")

        def read(source) -> None:
            for number in range(count):
                row = source.row(number)
                torch.from_numpy(row.token_ids), torch.from_numpy(row.labels), torch.from_numpy(row.loss_mask)

        def read_megatron() -> None:
            for number in range(count):
                megatron[number]

        seconds = best_of(repeats, {
            "glm truncate": lambda: read(truncated), "megatron-core GPTDataset": read_megatron, "glm best_fit": lambda: read(packed),
        })
        slow = seconds["megatron-core GPTDataset"]
        rows += [[f"{length:,}", name, f"{count * length / taken / 1e6:,.0f}", f"{slow / taken:.1f}"] for name, taken in seconds.items()]
    columns = ["row", "", "M tokens a CPU-second", "beside GPTDataset"]
    table(f"Reading rows of {len(lengths):,} documents, {len(tokens):,} tokens, from the page cache", columns, rows)


if __name__ == "__main__":
    main()
