"""This process's place among the ranks, as torchrun tells it through the environment."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    rank: int
    local_rank: int
    world_size: int


def place() -> Place:
    """RANK, LOCAL_RANK and WORLD_SIZE; alone without them."""
    return Place(
        rank=int(os.environ.get("RANK", 0)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
    )
