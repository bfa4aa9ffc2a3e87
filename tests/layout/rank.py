"""One rank: ``python -m tests.layout.rank OUT CASE...``, each case a JSON object; rank 0 writes OUT/NUMBER.pt."""

import gc
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from glm import platform


def main(out: Path, cases: list[str]) -> None:
    platform.activate("host")

    import torch
    import torch.distributed as dist

    from glm import runtime as runtimes
    from tests.layout.cases import Case
    from tests.layout.training import train
    from tests.layout.traps import TRAPS

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for number, text in enumerate(cases):
        case = Case.from_json(json.loads(text))
        # a new process group for each: those of the case before would keep their threads
        dist.init_process_group("gloo", init_method=f"file://{out}/store{number}", rank=rank, world_size=world_size)
        with TRAPS[case.trap]() if case.trap else nullcontext():
            trained = train(case)
        if dist.get_rank() == 0:
            torch.save(vars(trained), out / f"{number}.pt")
        runtimes.stop()
        gc.collect()    # cycles hold process groups, whose threads wake up a hundred times a second


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
