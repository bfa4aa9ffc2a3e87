"""Which optimizer owns which parameter: every parameter is in exactly one group."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from glm.optim.placement import placement

FROZEN_PREFIXES = {"embedding": "embedding.", "output": "output_layer.", "router": ".router.", "mtp": "mtp."}


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


def param_groups(named: list[tuple[str, torch.nn.Parameter]], frozen: tuple[str, ...] = ()) -> list[ParamGroup]:
    """Sorts parameters by name and shape; a rank that holds none of a group has it empty.

    Muon takes matrices that map hidden vectors to hidden vectors. AdamW takes embeddings, biases and norms (report,
    2.4), and by our choice the output head and the router, whose rows are classes rather than directions.
    """
    groups = {
        "muon": ParamGroup("muon", "matrices", weight_decay=True),
        "tables": ParamGroup("adamw", "embedding, output head, router", weight_decay=True),
        "vectors": ParamGroup("adamw", "biases and norms", weight_decay=False),
        "frozen": ParamGroup("frozen", "kept by optimizer.frozen", weight_decay=False),
    }
    for name, parameter in named:
        if is_frozen(name, frozen):
            group = groups["frozen"]
        elif parameter.dim() < 2:
            group = groups["vectors"]
        elif any(part in name for part in ("word_embeddings", "output_layer", ".router.")):
            group = groups["tables"]
        else:
            group = groups["muon"]
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


def table(groups: list[ParamGroup], sizes: list[tuple[int, int]]) -> str:
    """The groups as lines for the log, with their share of the parameters of the whole model."""
    tensors, parameters = (sum(column) for column in zip(*sizes))
    lines = [f"{'rule':<8}{'tensors':>8}{'parameters':>16}{'share':>8}  what"]
    for group, (count, size) in zip(groups, sizes):
        if count:
            lines.append(f"{group.rule:<8}{count:>8}{size:>16,}{size / parameters:>8.1%}  {group.reason}")
    return "\n".join([*lines, f"{'all':<8}{tensors:>8}{parameters:>16,}{1:>8.0%}"])
