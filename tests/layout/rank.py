"""One rank: ``python -m tests.layout.rank OUT CASE...``, each case a JSON object; rank 0 writes OUT/NUMBER.pt."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

from glm import platform


def main(out: Path, cases: list[str]) -> None:
    platform.activate("host")

    import torch
    import torch.distributed as dist

    from tests.layout.cases import Case
    from tests.layout.training import train
    from tests.layout.traps import TRAPS

    for number, text in enumerate(cases):
        case = Case.from_json(json.loads(text))
        with TRAPS[case.trap]() if case.trap else nullcontext():
            trained = train(case)
        if dist.get_rank() == 0:
            torch.save(vars(trained), out / f"{number}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
