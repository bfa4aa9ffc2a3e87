"""A checkpoint as a Hugging Face folder."""

from pathlib import Path
from typing import Iterator

from torch import Tensor
from tqdm import tqdm

from glm.checkpoint import store
from glm.convert.source import find_source
from glm.weights import one_rank
from glm.weights.gather import hf_tensors
from glm.weights.hf_folder import Written, write_folder
from glm.weights.name_map import hf_names


def to_hf(
    source: Path, out: Path, *, stage: str | None = None, platform: str = "host", tokenizer: Path | None = None,
    with_copies: bool = False, max_shard_bytes: int = 5_000_000_000,
) -> Written:
    """Exports the checkpoint that ``source`` means (see find_source) to ``out``, in the type it is stored in.

    ``tokenizer``: a folder to copy instead of the run's. Works in this process alone, which holds the whole model once.
    Raises CheckpointError and PlatformError; ``out`` is whole or as it was.
    """
    found = find_source(source, stage)
    info, shape = store.read_info(found.checkpoint)
    one_rank.start(shape, platform=platform)
    model = one_rank.build(shape, params=store.stored_params(found.checkpoint), rotary_base=info.rotary_base, megatron=info.megatron)
    store.load(found.checkpoint, [model])
    return write_folder(
        Path(out), _with_bar(hf_tensors([model], shape), len(hf_names(shape))), shape, rotary_base=info.rotary_base,
        tokenizer=tokenizer or found.tokenizer, max_shard_bytes=max_shard_bytes, with_copies=with_copies,
        source={"stage": info.stage, "step": info.step, "run_tokens": info.run_tokens},
    )


def _with_bar(tensors: Iterator[tuple[str, Tensor]], total: int) -> Iterator[tuple[str, Tensor]]:
    """disable=None: drawn on a terminal only."""
    return iter(tqdm(tensors, total=total, desc="export", unit="tensor", disable=None))
