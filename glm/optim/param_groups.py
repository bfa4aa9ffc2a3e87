"""Which optimizer owns which parameter: every parameter is in exactly one group."""

from dataclasses import dataclass, field

import torch

FROZEN_PREFIXES = {"embedding": "embedding.", "output": "output_layer.", "router": ".router.", "mtp": "mtp."}


@dataclass
class ParamGroup:
    """Parameters treated alike. ``rule`` is muon, adamw or frozen."""

    rule: str
    reason: str
    weight_decay: bool
    names: list[str] = field(default_factory=list)
    params: list[torch.nn.Parameter] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.params)


def is_frozen(name: str, frozen: tuple[str, ...]) -> bool:
    """True when the recipe's ``optimizer.frozen`` names this parameter's part of the model."""
    return any(FROZEN_PREFIXES[part] in f".{name}" if part == "router" else name.startswith(FROZEN_PREFIXES[part])
               for part in frozen)


def param_groups(named: list[tuple[str, torch.nn.Parameter]], frozen: tuple[str, ...] = ()) -> list[ParamGroup]:
    """Sorts all parameters of ``model`` by name and shape.

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
    filled = [group for group in groups.values() if group.params]
    owned = [id(parameter) for group in filled for parameter in group.params]
    return filled


def table(groups: list[ParamGroup]) -> str:
    """The groups as lines for the log, with their share of the parameters of this rank."""
    total = sum(group.size for group in groups)
    lines = [f"{'rule':<8}{'tensors':>8}{'parameters':>16}{'share':>8}  what"]
    for group in groups:
        lines.append(
            f"{group.rule:<8}{len(group.params):>8}{group.size:>16,}{group.size / total:>8.1%}  {group.reason}"
        )
    lines.append(f"{'all':<8}{sum(len(group.params) for group in groups):>8}{total:>16,}{1:>8.0%}")
    return "\n".join(lines)
