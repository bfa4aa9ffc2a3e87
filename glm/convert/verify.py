"""The proof of a conversion: every tensor equal, and transformers and megatron computing the same from them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glm.checkpoint import manifest
from glm.convert.differences import Compared, compare
from glm.convert.source import find_source
from glm.errors import CheckpointError
from glm.platform import active
from glm.weights.hf_reader import HFFolder


@dataclass(frozen=True)
class Verification:
    """What was compared, and how far apart the two programs are (largest absolute difference, float32)."""

    tensors: int
    bytes: int
    """Of the folder's tensors."""
    quantised: int
    """Tensors in FP8 that are exactly this suite's rounding of the checkpoint's; the others have the same values."""
    digests: bool
    """Whether both sides were also compared with the digests in their manifests."""
    max_logit_difference: float | None = None
    """None where logits were not compared."""
    max_logit: float | None = None
    mtp_loss_difference: float | None = None
    """Of the mean loss of the MTP layer; None without one."""


def verify(
    source: Path, hf_folder: Path, *, stage: str | None = None, platform: str = "host", num_tokens: int = 64,
    tolerance: float = 1e-4, seed: int = 0, logits: bool = True, workers: int = 2,
) -> Verification:
    """Compares the checkpoint that ``source`` means with ``hf_folder``: first the bytes of both with their manifests, then
    every tensor (see differences.compare), then logits on ``num_tokens`` random tokens and the MTP layer's loss on them,
    which must agree within ``tolerance``.

    The first two take little memory; logits take both models in float32, in this process, and are left out without
    ``logits`` and for a folder whose weights were rounded to FP8. Raises CheckpointError naming the file, or the worst
    tensors.
    """
    checkpoint = find_source(source, stage).checkpoint
    info, shape = manifest.read_info(checkpoint)
    folder = HFFolder(hf_folder)
    _require_same_shape(folder, shape.model_dump() | {"rotary_base": info.rotary_base})
    proved = manifest.verify(checkpoint)
    folder.check_copies()
    compared = compare(checkpoint, folder, workers=workers)
    _require_equal(compared, checkpoint, Path(hf_folder))
    digests = proved and all(folder.expected_digest(name) for name in folder.names)
    told = (compared.tensors, compared.bytes, compared.quantised, digests)
    if not logits or folder.is_quantised:
        return Verification(*told)
    result = Verification(*told, *_programs(checkpoint, hf_folder, platform, num_tokens, seed))
    _require_agreement(result, checkpoint, Path(hf_folder), tolerance)
    return result


def _require_same_shape(folder: HFFolder, expected: dict) -> None:
    found = folder.shape.model_dump() | {"rotary_base": folder.rotary_base}
    differing = [key for key in expected if found[key] != expected[key]]
    if differing:
        raise CheckpointError(
            f"{folder.folder}/config.json", ", ".join(f"{key} {found[key]}" for key in differing),
            ", ".join(f"{key} {expected[key]}" for key in differing), "compare a checkpoint with its own export",
        )


def _require_equal(compared: Compared, checkpoint: Path, folder: Path) -> None:
    if compared.differing:
        worst = sorted(compared.differing, key=compared.differing.__getitem__, reverse=True)[:5]
        raise CheckpointError(
            f"{checkpoint} and {folder}",
            f"{len(compared.differing)} of {compared.tensors} tensors differ, most: "
            + ", ".join(f"{name} by {compared.differing[name]:.3g}" for name in worst),
            "equal tensors", "export again, and keep the folder unchanged",
        )


def _programs(checkpoint: Path, hf_folder: Path, platform: str, num_tokens: int, seed: int):
    """(largest logit difference, largest logit, difference of the mean MTP loss) of megatron and transformers, in float32."""
    from glm.checkpoint import store  # megatron comes with it, which the comparison of tensors does without
    from glm.convert.reference import Reference
    from glm.weights import one_rank

    info, shape = manifest.read_info(checkpoint)
    one_rank.start(shape, platform=platform, seed=seed)
    model = one_rank.build(shape, params="fp32", rotary_base=info.rotary_base, megatron=info.megatron)
    store.load(checkpoint, [model])  # also of a bfloat16 checkpoint: its values are float32 values, its routers' are no others
    return _compare_programs(model, Reference(hf_folder), shape.vocab_size, num_tokens, seed)


@torch.no_grad()
def _compare_programs(model, reference, vocab_size: int, num_tokens: int, seed: int):
    """(largest logit difference, largest logit, difference of the mean MTP loss)."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(vocab_size, (1, num_tokens), generator=generator)
    ours, theirs = logits(model, token_ids), reference.logits(token_ids)
    mtp = None
    if reference.mtp is not None:
        mtp = abs(mtp_loss(model, token_ids) - reference.mtp_losses(token_ids).mean().item())
    return (ours - theirs).abs().max().item(), theirs.abs().max().item(), mtp


def logits(model, token_ids_BS: Tensor) -> Tensor:
    """megatron's [B, S, V], on the CPU."""
    return model(**_inputs(token_ids_BS)).float().cpu()


@torch.no_grad()
def mtp_loss(model, token_ids_BS: Tensor) -> float:
    """megatron's mean loss of the MTP layer over all tokens that have a token two further on."""
    device = active().device
    labels = token_ids_BS.roll(-1, dims=1).to(device)
    mask = torch.ones_like(labels, dtype=torch.float32)
    mask[:, -1] = 0  # the last token has no next one
    model.take_mtp_loss()
    weight, model.mtp_weight = model.mtp_weight, 1.0
    model(**_inputs(token_ids_BS), labels=labels, loss_mask=mask)
    model.mtp_weight = weight
    total, count, *_ = model.take_mtp_loss().tolist()
    return total / count


def _inputs(token_ids_BS: Tensor) -> dict:
    device = active().device
    positions = torch.arange(token_ids_BS.shape[1], device=device).expand(token_ids_BS.shape)
    return {"input_ids": token_ids_BS.to(device), "position_ids": positions, "attention_mask": None}


def _require_agreement(result: Verification, checkpoint: Path, folder: Path, tolerance: float) -> None:
    if not all(found <= tolerance for found in (result.max_logit_difference, result.mtp_loss_difference or 0.0)):  # also of nan
        mtp = "" if result.mtp_loss_difference is None else f", the MTP loss by {result.mtp_loss_difference:.2e}"
        raise CheckpointError(
            f"{checkpoint} and {folder}", f"equal tensors, but logits differ by {result.max_logit_difference:.2e}{mtp}",
            f"at most {tolerance:g}", "the two programs compute different networks from them: run the tests in tests/parity",
        )
