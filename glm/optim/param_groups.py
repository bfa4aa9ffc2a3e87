"""Which optimizer owns which parameter: every parameter is in exactly one group."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from glm.optim.placement import placement
from glm.recipe.sections import AdamWAlone, Muon

FROZEN_PREFIXES = {"embedding": "embedding.", "output": "output_layer.", "router": ".router.", "mtp": "mtp."}

TABLES = {"word_embeddings": "embedding", "output_layer": "output head", ".router.": "router"}
"""Matrices with a row for each of a set of things, by a part of their names."""


@dataclass
class ParamGroup:
    """Parameters treated alike. ``rule`` is muon, adamw or frozen."""

    rule: str
    reason: str
    weight_decay: bool
    names: list[str] = field(default_factory=list)
    params: list[torch.nn.Parameter] = field(default_factory=list)


def is_frozen(name: str, frozen: tuple[str, ...]) -> bool:
    """True when the recipe's ``optimizer.frozen`` names this parameter's part of the model."""
    return any(FROZEN_PREFIXES[part] in f".{name}" if part == "router" else name.startswith(FROZEN_PREFIXES[part])
               for part in frozen)


def param_groups(named: list[tuple[str, torch.nn.Parameter]], settings: Muon | AdamWAlone) -> list[ParamGroup]:
    """Sorts parameters by name and shape; a rank that holds none of a group has it empty.

    Muon takes matrices that map hidden vectors to hidden vectors, and head and routers where the recipe says so. AdamW takes
    embedding, biases and norms (report, 2.4). Under AdamW alone the same groups differ in weight decay only.
    """
    muon = isinstance(settings, Muon)
    rules = {"matrices": "muon", "embedding": "adamw", "output head": settings.head, "router": settings.router} if muon else dict.fromkeys(
        ("matrices", "embedding", "output head", "router"), "adamw")
    groups = {
        rule: ParamGroup(rule, ", ".join(kind for kind, its in rules.items() if its == rule), weight_decay=True) for rule in ("muon", "adamw")
    } | {
        "vectors": ParamGroup("adamw", "biases and norms", weight_decay=False),
        "frozen": ParamGroup("frozen", "kept by optimizer.frozen", weight_decay=False),
    }
    for name, parameter in named:
        if is_frozen(name, settings.frozen):
            group = groups["frozen"]
        elif parameter.dim() < 2:
            group = groups["vectors"]
        else:
            group = groups[rules[next((kind for part, kind in TABLES.items() if part in name), "matrices")]]
        group.names.append(name)
        group.params.append(parameter)
    return list(groups.values())


def whole_model_sizes(groups: list[ParamGroup], device: torch.device) -> list[tuple[int, int]]:
    """(tensors, parameters) of each group over the whole model, every one counted once. Collective over all ranks."""
    sizes = torch.zeros(len(groups), 2, dtype=torch.int64, device=device)
    for index, group in enumerate(groups):
        for parameter in group.params:
            place = placement(parameter)
            sizes[index] += torch.tensor([place.first, place.counted * parameter.numel()], device=device)
    dist.all_reduce(sizes)
    return [(tensors, parameters) for tensors, parameters in sizes.tolist()]


def table(groups: list[ParamGroup], sizes: list[tuple[int, int]], settings: Muon | AdamWAlone) -> str:
    """The groups as lines for the log, with their share of the parameters of the whole model, and what Muon does."""
    tensors, parameters = (sum(column) for column in zip(*sizes))
    lines = [f"{'rule':<8}{'tensors':>8}{'parameters':>16}{'share':>8}  what"]
    for group, (count, size) in zip(groups, sizes):
        if count:
            lines.append(f"{group.rule:<8}{count:>8}{size:>16,}{size / parameters:>8.1%}  {group.reason}")
    lines.append(f"{'all':<8}{tensors:>8}{parameters:>16,}{1:>8.0%}")
    if isinstance(settings, Muon):
        lines.append(
            f"muon: {settings.newton_schulz_steps} Newton-Schulz steps ({settings.coefficients}, {settings.newton_schulz_dtype}), momentum {settings.momentum:g}"
            f"{' (Nesterov)' * settings.nesterov}, update RMS {settings.update_rms:g}, qkv {settings.split.qkv}, gate and up {settings.split.gate_up}"
        )
    return "\n".join(lines)
