"""Proof on the built model, before a packed stage begins, that attention does not leave a document.

A pack of three documents goes through the core attention of every rank's first layer, and of its MTP layer, twice; the second
time all numbers of one document are others. What the other documents get must be the same bit for bit, and what the changed one
gets must not. Under context parallelism the first and the last document lie on several ranks.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType

from glm.errors import NumericsError
from glm.model.chunks import named_modules
from glm.train.batch import context_part, packed_batch
from glm.train.step import Trainer

UNIT = 16
"""The documents have 3, 1 and 4 times as many tokens, before the pack is made to divide."""


@torch.no_grad()
def check_documents_apart(trainer: Trainer) -> str:
    """What was shown, in one line. Collective over all ranks. Raises NumericsError on all of them when a document leaks on any."""
    layout, device = trainer.recipe.layout, trainer.device
    modules = [one for one in named_modules(trainer.chunks) if one[0].endswith("core_attention")]
    probed = [*modules[:1], *(one for one in modules[1:] if one[0].startswith("mtp."))]
    lengths = [3 * UNIT, UNIT, 4 * UNIT]
    ids = [torch.zeros(length, dtype=torch.int64) for length in lengths]
    pack = packed_batch(ids, ids, [torch.ones(length) for length in lengths], lengths, device, multiple_of=2 * layout.cp)
    whole = pack.documents.lengths
    pack.extra["document"] = torch.repeat_interleave(torch.arange(len(whole)), torch.tensor(whole))[None].to(device)
    part = context_part(pack, parallel_state.get_context_parallel_rank(), layout.cp)
    leaks = torch.zeros(2, dtype=torch.int32, device=device)
    for _, attention in probed:
        for changed in range(len(lengths)):
            inside = part.extra["document"][0] == changed
            before, after = (_outputs(trainer, attention, part, inside, shift) for shift in (0.0, 1.0))
            same = (before == after).all(-1)
            leaks[0] += (~same & ~inside).any().int()
            leaks[1] += (same & inside).any().int()
    dist.all_reduce(leaks)
    others, own = leaks.tolist()
    where = f"{trainer.recipe.stage}: attention across packed documents"
    if others or own:
        raise NumericsError(
            where, f"{others} probes in which a document changed what another one got, {own} in which it did not change its own", "none",
            "do not train: attention of this build leaks between documents; set kernels.attention=sdpa, run pytest tests/train/test_separation.py",
        )
    names = " and ".join(name.split(".self_attention")[0] for name, _ in probed)
    return f"{where} is zero: {len(lengths)} documents of {sum(lengths)} tokens, cp {layout.cp}, bit for bit on every rank ({names})"


def _outputs(trainer: Trainer, attention, part, inside: torch.Tensor, shift: float) -> torch.Tensor:
    """[S, N x D] of random queries, keys and values, those of one document moved by ``shift``."""
    model, layout, length = trainer.recipe.model, trainer.recipe.layout, part.token_ids.shape[1]
    generator = torch.Generator().manual_seed(trainer.recipe.seed)
    query, key, value = (
        torch.randn(length, 1, heads // layout.tp, model.head_dim, generator=generator).to(trainer.device, trainer.config.params_dtype)
        for heads in (model.num_attention_heads, model.num_query_groups, model.num_query_groups)
    )
    for tensor in (query, key, value):
        tensor[inside] += shift
    return attention(query, key, value, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=part.documents)[:, 0]
