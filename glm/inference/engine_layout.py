"""What SGLang must hold after a push of weights: the proof that none was lost, half-written or left old.

The trainer knows the tensors it exported under their Hugging Face names. The engine fuses some of them and keeps others
in float32. This file fuses the same way and takes the same digest, for every tensor of the target model and of the MTP
draft, so that the two sides can be compared name by name.

Digest: the first 8 bytes of the SHA-256 of the tensor's bytes, as SGLang's /weights_checker computes it for tensors in
host memory (sglang/srt/managers/mm_utils.py:924). For one in GPU memory it is another function, not yet known here.

    engine                                   Hugging Face
    *.self_attn.qkv_proj.{weight,bias}       q_proj, k_proj, v_proj, one above the other
    *.mlp.gate_up_proj.weight                gate_proj, up_proj (dense layers; shared_experts likewise)
    *.mlp.experts.w13_weight [E, 2 I, H]     per expert gate_proj above up_proj
    *.mlp.experts.w2_weight  [E, H, I]       per expert down_proj
    *.mlp.gate.*                             the same, always float32
    draft: model.{enorm,hnorm,eh_proj,shared_head.norm}, model.decoder.*     model.layers.N.*
    draft: model.embed_tokens, lm_head       the target's own tensors
"""

import hashlib
import re
from typing import Mapping

import torch
from torch import Tensor

from glm.errors import EngineError

Digests = dict[str, dict[str, str]]

VOCABULARY_PADDING = 64
"""SGLang pads embedding and head to a multiple of this many rows, with zeros (layers/vocab_parallel_embedding.py)."""
_FUSED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2),
          "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_MTP_OWN = ("enorm.", "hnorm.", "eh_proj.", "shared_head.norm.")


def expected_digests(hf_tensors: Mapping[str, Tensor], num_layers: int, *, dtype: torch.dtype, has_draft: bool) -> Digests:
    """{"target": {engine name: digest}, "draft": {...}} of a server (tp: 1) that loaded ``hf_tensors`` and computes in ``dtype``.

    ``has_draft``: the server decodes speculatively; without, the MTP layer is not loaded and the draft's map is empty.
    Raises EngineError for a name that has no place in the engine, and for parts of a fused tensor that are missing.
    """
    layout = engine_tensors(hf_tensors, num_layers, dtype=dtype, has_draft=has_draft)
    return {role: {name: digest(tensor) for name, tensor in tensors.items()} for role, tensors in layout.items()}


def engine_tensors(hf_tensors: Mapping[str, Tensor], num_layers: int, *, dtype: torch.dtype,
                   has_draft: bool) -> dict[str, dict[str, Tensor]]:
    """The tensors themselves, as the engine holds them."""
    mtp = f"model.layers.{num_layers}."
    target = {name: tensor for name, tensor in hf_tensors.items() if not name.startswith(mtp)}
    roles = {"target": _fused(target, dtype), "draft": {}}
    if has_draft:
        draft = {_draft_name(name, mtp): tensor for name, tensor in hf_tensors.items()
                 if name.startswith(mtp) and not _shared(name)}
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            draft[name] = hf_tensors[name]
        roles["draft"] = _fused(draft, dtype)
    return roles


def compare(expected: Digests, found: Digests, where: str = "weights of the engine") -> None:
    """Returns when both sides hold the same. Raises EngineError naming every tensor that is missing, unexpected or different."""
    flat = [{f"{role}.{name}": value for role, tensors in side.items() for name, value in tensors.items()}
            for side in (expected, found)]
    missing = sorted(set(flat[0]) - set(flat[1]))
    unexpected = sorted(set(flat[1]) - set(flat[0]))
    different = sorted(name for name in set(flat[0]) & set(flat[1]) if flat[0][name] != flat[1][name])
    if missing or unexpected or different:
        told = [f"{what} {len(names)}: {', '.join(names)}" for what, names in
                (("missing", missing), ("unexpected", unexpected), ("different", different)) if names]
        raise EngineError(where, "; ".join(told), f"the {len(flat[0])} tensors that were sent, bit for bit",
                          "do not sample from this engine: push the weights again, and read its log if that does not help")


def digest(tensor: Tensor) -> str:
    """16 hexadecimal digits over the bytes of ``tensor``."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(raw)).digest()[:8].hex()


def _fused(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        tensor = tensor.to(torch.float32 if ".mlp.gate." in name else dtype)
        prefix, _, kind = name.rpartition(".")
        parent, _, module = prefix.rpartition(".")
        if expert := _EXPERT.fullmatch(name):
            experts.setdefault(expert[1], {}).setdefault(int(expert[2]), {})[expert[3]] = tensor
        elif module in _FUSED:
            fused, place = _FUSED[module]
            parts.setdefault(f"{parent}.{fused}.{kind}", {})[place] = tensor
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            padding = -tensor.shape[0] % VOCABULARY_PADDING
            plain[name] = torch.nn.functional.pad(tensor, (0, 0, 0, padding))
        else:
            plain[name] = tensor
    for name, placed in parts.items():
        _whole(name, placed, 3 if "qkv_proj" in name else 2)
        plain[name] = torch.cat([placed[i] for i in range(len(placed))])
    for name, of in experts.items():
        _whole(name, of, max(of) + 1)
        for expert in of.values():
            _whole(name, expert, 3)
        plain[f"{name}.w13_weight"] = torch.stack([torch.cat([of[e]["gate"], of[e]["up"]]) for e in range(len(of))])
        plain[f"{name}.w2_weight"] = torch.stack([of[e]["down"] for e in range(len(of))])
    return plain


def _whole(name: str, parts: Mapping, count: int) -> None:
    if len(parts) != count:
        raise EngineError(f"tensor {name} of the engine", f"parts {sorted(parts)}", f"{count} parts",
                          "the exported tensors are incomplete; see the weight map")


def _shared(name: str) -> bool:
    """Copies of embedding and head inside the MTP layer: SGLang skips them and uses the target's."""
    return name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))


def _draft_name(name: str, mtp: str) -> str:
    rest = name.removeprefix(mtp)
    return f"model.{rest}" if rest.startswith(_MTP_OWN) else f"model.decoder.{rest}"
