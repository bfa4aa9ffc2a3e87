"""What observing a step costs: steps that tell everything against steps that tell their loss and gradient norm only.

    OMP_NUM_THREADS=1 python benchmarks/observing.py [--shapes tiny 29m] [--repeats 40]

One Trainer on one rank, the same batch, three kinds of step in turns (A B C A B C …); what counts is the smallest CPU time of each.

- bare: ``Trainer.step`` with the plain loss, nothing observed, nothing written
- every: loss by source and position, load, MaxVio, dead experts, biases, MTP, speed; the line of metrics.jsonl and of the console
- detailed: that, and gradient and update of every part and layer, the largest attention logit of every layer, the load of every expert

The last column is what a run pays: one step of ``logging.detail_every_steps`` is detailed, the others are not.
"""

import argparse
import io
import os
import platform
import tempfile
import time
from contextlib import redirect_stdout
from datetime import date
from pathlib import Path

import torch

from glm import platform as platforms

platforms.activate("host")

from train import BATCHES, LR, ROTARY_BASE, SHAPES  # noqa: E402  (train.py beside this file; imports megatron)
from glm.metrics.log import MetricLog  # noqa: E402
from glm.recipe.schema import TrainRecipe  # noqa: E402
from glm.recipe.sections import Logging, Model  # noqa: E402
from glm.train.batch import plain_batch  # noqa: E402
from glm.train.losses import LossByPart, next_token_loss  # noqa: E402
from glm.train.metrics import StepMetrics  # noqa: E402
from glm.train.observe import Observation  # noqa: E402
from glm.train.plan import Progress, plan_step  # noqa: E402
from glm.train.step import Trainer  # noqa: E402
from glm.weights import one_rank  # noqa: E402

SOURCES = ["code", "dialogues", "prose"]
KINDS = ("bare", "every", "detailed")


class Blind:
    """Stands in for the observer and looks at nothing."""

    def begin(self, *, detailed: bool) -> None: ...

    def note_load(self) -> None: ...

    def before_update(self) -> None: ...

    def after_update(self, lr: float) -> None: ...

    def collect(self) -> Observation:
        return Observation([], [], [], 0.0, 0.0, 0.0, None)


class Steps:
    """Steps of the three kinds on one model."""

    def __init__(self, shape: Model, rows: int, length: int, folder: Path):
        shape = shape.model_copy(update={"num_mtp_layers": 1})
        one_rank.start(shape, platform="host")
        self.recipe = TrainRecipe(
            name="benchmark", stage="benchmark", main="pretrain.train", run_folder="unused", model=shape, platform="host",
            sequence_length=length, rotary_base=ROTARY_BASE, batch={"tokens": rows * length, "micro_batch_size": rows}, tokens=rows * length,
            schedule={"peak_lr": LR, "final_lr": LR}, precision={"params": "fp32"}, kernels={"attention": "sdpa", "experts": "host"},
            data={"mixture": "unused", "sources": {"prose": {"corpus": "prose", "share": 1.0}}},
        )
        self.trainer = Trainer(self.recipe)
        self.seeing = self.trainer.observer
        ids = torch.randint(shape.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
        source = {"source": [torch.full((length,), row % len(SOURCES)) for row in range(rows)]}
        self.batch = plain_batch(list(ids[:, :-1]), list(ids[:, 1:]), [torch.ones(length)] * rows, ids.device, source)
        self.loss, self.told = LossByPart(SOURCES, length), StepMetrics(self.recipe)
        self.log, self.number = MetricLog(folder, "benchmark", total_steps=None), 0

    def step(self, kind: str) -> float:
        """CPU-seconds."""
        self.trainer.observer = Blind() if kind == "bare" else self.seeing
        plan = plan_step(self.recipe, Progress())
        started = time.process_time()
        outcome = self.trainer.step(
            [self.batch], next_token_loss if kind == "bare" else self.loss, lr=LR, mtp_weight=0.3, bias_update_rate=1e-3,
            detailed=kind == "detailed",
        )
        if kind != "bare":
            self.number += 1
            self.log.line(self.number, self.told(plan, Progress().after(plan), outcome, 1.0, self.trainer.phases.take()))
        return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["tiny", "29m"], choices=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    every = Logging().detail_every_steps
    print(f"{date.today()}, {os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, one thread\n")
    print(f"| shape | tokens | bare, ms | every step, ms | detailed, ms | every step | detailed | one of {every} detailed |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for shape in options.shapes:
        rows, length = BATCHES[shape]
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            steps = Steps(SHAPES[shape], rows, length, Path(folder))
            best = dict.fromkeys(KINDS, float("inf"))
            for turn in range(options.repeats + 2):
                for kind in KINDS:
                    seconds = steps.step(kind)
                    if turn >= 2:
                        best[kind] = min(best[kind], seconds)
        bare, plain, detailed = (best[kind] for kind in KINDS)
        mean = ((every - 1) * plain + detailed) / every
        times = " | ".join(f"{1000 * seconds:.1f}" for seconds in (bare, plain, detailed))
        shares = " | ".join(f"{seconds / bare - 1:+.1%}" for seconds in (plain, detailed, mean))
        print(f"| {shape} | {rows * length:,} | {times} | {shares} |")


if __name__ == "__main__":
    main()
