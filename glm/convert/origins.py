"""Which rows of a checkpoint are which tensor of its Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import torch

from glm.checkpoint.torch_dist import Item, Stored
from glm.convert.stored_rows import StoredRows
from glm.convert.streams import Stream
from glm.errors import CheckpointError
from glm.recipe.sections import Model
from glm.weights.arrangement import Run, arrangement
from glm.weights.digest import type_name
from glm.weights.hf_folder import DTYPES
from glm.weights.hf_shapes import hf_shapes
from glm.weights.name_map import check_names, rows


@dataclass(frozen=True)
class Origin:
    """The rows of the checkpoint that are a tensor of the folder, in its order."""

    key: str
    expert: int | None
    runs: tuple[Run, ...]

    def streams(self, rows: StoredRows) -> Iterator[tuple[Stream, tuple[Item, ...]]]:
        """The tensor's bytes in the type it is stored in, and the chunks they come from."""
        for run in self.runs:
            yield from rows.streams(self.key, self.expert, run.row, run.count)


def is_weight(key: str) -> bool:
    """Not the optimizer's state, nor what megatron's modules save of themselves."""
    return not key.startswith("optimizer.") and not key.endswith("_extra_state")


def origins(checkpoint: Path, shape: Model, params: str, stored: dict[str, Stored]) -> dict[str, Origin]:
    """{tensor of the folder: its rows}. Raises CheckpointError for a tensor that is missing, unknown or of another shape."""
    sizes, table = hf_shapes(shape), rows(shape)
    check_names(filter(is_weight, stored), [row.megatron for row in table], where=str(checkpoint))
    found = {}
    for row in table:
        arranged, tensor = arrangement(row, shape, sizes), stored[row.megatron]
        if tensor.shape != arranged.shape or tensor.dtype not in (DTYPES[params], torch.float32):
            raise CheckpointError(
                f"{checkpoint}: {row.megatron}", f"{type_name(tensor.dtype)} {list(tensor.shape)}",
                f"{params} {list(arranged.shape)}", "use the checkpoint with the manifest that was written with it",
            )
        for expert in [None] if arranged.experts is None else range(arranged.experts):
            for part, name in enumerate(row.names([expert])):
                own = sorted((run for run in arranged.runs if run.part == part), key=lambda run: run.part_row)
                found[name] = Origin(row.megatron, expert, tuple(own))
    return found
