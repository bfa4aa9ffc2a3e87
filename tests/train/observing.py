"""Two observed steps under one layout: ``python -m tests.train.observing OUT CASE...``, each case a JSON object; rank 0 writes OUT/NUMBER.json."""

import json
import os
import sys
from pathlib import Path

from glm import platform

STEPS = 2


def observe(case) -> list[dict]:
    """What is logged of each step, every measurement on."""
    from glm.train.losses import LossByPart
    from glm.train.metrics import StepMetrics
    from glm.train.plan import Progress, plan_step
    from tests.layout.cases import LENGTH
    from tests.layout.training import batches, trainer

    one, runtime = trainer(case)
    loss, told, lines = LossByPart(["even", "odd"], LENGTH), StepMetrics(one.recipe), []
    for step in range(STEPS):
        outcome = one.step(
            batches(case, runtime, step), loss, lr=1e-2, mtp_weight=0.3, bias_update_rate=1e-3, detailed=True,
        )
        plan = plan_step(one.recipe, Progress())
        lines.append(told(plan, Progress().after(plan), outcome, seconds=1.0) | {"ranks": runtime.world_size})
    held_out = one.evaluate(batches(case, runtime, STEPS), loss)
    lines[-1] |= {f"validation/{name}": mean for name, mean in held_out.items()}
    return lines


def main(out: Path, cases: list[str]) -> None:
    platform.activate("host")

    import torch.distributed as dist

    from glm import runtime as runtimes
    from tests.layout.cases import Case

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for number, text in enumerate(cases):
        dist.init_process_group("gloo", init_method=f"file://{out}/store{number}", rank=rank, world_size=world_size)
        lines = observe(Case.from_json(json.loads(text)))
        if rank == 0:
            (out / f"{number}.json").write_text(json.dumps(lines))
        runtimes.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
