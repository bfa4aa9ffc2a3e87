"""The proof of a conversion: every tensor equal, and transformers and megatron computing the same from them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from glm.checkpoint import store
from glm.convert.reference import Reference
from glm.convert.source import find_source
from glm.errors import CheckpointError
from glm.platform import active
from glm.weights import one_rank
from glm.weights.digest import tensor_digest
from glm.weights.gather import hf_tensors
from glm.weights.hf_reader import HFFolder
from glm.weights.name_map import hf_names


@dataclass(frozen=True)
class Verification:
    """What was compared, and how far apart the two programs are (largest absolute difference, float32)."""

    tensors: int
    max_logit_difference: float
    max_logit: float
    mtp_loss_difference: float | None
    """Of the mean loss of the MTP layer; None without one."""


def verify(
    source: Path, hf_folder: Path, *, stage: str | None = None, platform: str = "host", num_tokens: int = 64,
    tolerance: float = 1e-4, seed: int = 0,
) -> Verification:
    """Compares the checkpoint that ``source`` means with ``hf_folder``.

    Tensors must be equal in every byte after rounding to the folder's type; logits on ``num_tokens`` random tokens and the
    MTP layer's loss on them must agree within ``tolerance``. Raises CheckpointError naming the worst tensors otherwise.
    """
    checkpoint = find_source(source, stage).checkpoint
    info, shape = store.read_info(checkpoint)
    with HFFolder(hf_folder) as folder:
        _require_same_shape(folder, shape.model_dump() | {"rotary_base": info.rotary_base})
        folder.check_copies()
        one_rank.start(shape, platform=platform, seed=seed)
        params = store.stored_params(checkpoint)
        model = one_rank.build(shape, params=params, rotary_base=info.rotary_base, megatron=info.megatron)
        store.load(checkpoint, [model])
        differences = _differences(model, shape, folder)
    if params != "fp32":
        exact = one_rank.build(shape, params="fp32", rotary_base=info.rotary_base, megatron=info.megatron)
        exact.load_state_dict(model.state_dict(), strict=False)
        model = exact
    outcome = _compare_programs(model, Reference(hf_folder), shape.vocab_size, num_tokens, seed)
    result = Verification(len(hf_names(shape)), *outcome)
    _require_agreement(result, differences, checkpoint, Path(hf_folder), tolerance)
    return result


def _require_same_shape(folder: HFFolder, expected: dict) -> None:
    found = folder.shape.model_dump() | {"rotary_base": folder.rotary_base}
    differing = [key for key in expected if found[key] != expected[key]]
    if differing:
        raise CheckpointError(
            f"{folder.folder}/config.json", ", ".join(f"{key} {found[key]}" for key in differing),
            ", ".join(f"{key} {expected[key]}" for key in differing), "compare a checkpoint with its own export",
        )


def _differences(model, shape, folder: HFFolder) -> dict[str, float]:
    """{name: largest absolute difference} of the tensors that are not equal."""
    found = {}
    for name, tensor in tqdm(hf_tensors([model], shape), total=len(hf_names(shape)), desc="compare", unit="tensor", disable=None):
        other = folder.get(name)
        is_bias = name.endswith("e_score_correction_bias")
        own = tensor.cpu() if is_bias else tensor.cpu().to(other.dtype)
        if own.shape != other.shape:
            found[name] = float("inf")
        elif tensor_digest(own) != tensor_digest(other):
            found[name] = (own.float() - other.float()).abs().max().item()
    return found


@torch.no_grad()
def _compare_programs(model, reference: Reference, vocab_size: int, num_tokens: int, seed: int):
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
    total, count = model.take_mtp_loss().tolist()
    return total / count


def _inputs(token_ids_BS: Tensor) -> dict:
    device = active().device
    positions = torch.arange(token_ids_BS.shape[1], device=device).expand(token_ids_BS.shape)
    return {"input_ids": token_ids_BS.to(device), "position_ids": positions, "attention_mask": None}


def _require_agreement(
    result: Verification, differences: dict[str, float], checkpoint: Path, folder: Path, tolerance: float,
) -> None:
    told = f"logits differ by {result.max_logit_difference:.2e}" + (
        "" if result.mtp_loss_difference is None else f", the MTP loss by {result.mtp_loss_difference:.2e}"
    )
    if differences:
        worst = sorted(differences, key=differences.__getitem__, reverse=True)[:5]
        raise CheckpointError(
            f"{checkpoint} and {folder}",
            f"{len(differences)} of {result.tensors} tensors differ, most: "
            + ", ".join(f"{name} by {differences[name]:.3g}" for name in worst) + f"; {told}",
            "equal tensors", "export again, and keep the folder unchanged",
        )
    largest = max(result.max_logit_difference, result.mtp_loss_difference or 0.0)
    if not largest <= tolerance:
        raise CheckpointError(
            f"{checkpoint} and {folder}", f"equal tensors, but {told}", f"at most {tolerance:g}",
            "the two programs compute different networks from them: run the tests in tests/parity",
        )
