"""What observing a step costs: steps that tell everything against steps that tell their loss and gradient norm only.

    OMP_NUM_THREADS=1 python benchmarks/observing.py [--shapes tiny 29m] [--repeats 40]

One Trainer on one rank, the same batch, three kinds of step in turns (A B C A B C …); what counts is the smallest CPU time of each.

- bare: ``Trainer.step`` with the plain loss, nothing observed, nothing written
- every: loss by source and position, load, MaxVio, dead experts, biases, MTP, speed; the line of metrics.jsonl and of the console
- detailed: that, and gradient and update of every part and layer, the largest attention logit of every layer, the load of every expert

A step's CPU time varies by more than observing costs when other work shares the machine, so the same work is also timed by itself
(second table): smallest time of each part, over the bare step. What a run pays is a step of which one in ``logging.detail_every_steps``
is detailed.
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
from glm.model.attention_logits import LogitWatch  # noqa: E402
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
            self.log.line(self.number, self.told(plan, Progress().after(plan), outcome, 1.0, self.trainer.phases.so_far()))
        return time.process_time() - started


def smallest(work, repeats: int) -> float:
    """CPU-seconds."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return min(seconds)


def parts(steps: Steps, repeats: int) -> dict[str, float]:
    """CPU-seconds of what observing adds to a step, one part after the other."""
    trainer, observer, batch = steps.trainer, steps.seeing, steps.batch
    trainer.observer = observer
    losses, plan = torch.rand(batch.token_ids.shape), plan_step(steps.recipe, Progress())
    outcome = trainer.step([batch], steps.loss, lr=LR, mtp_weight=0.3, bias_update_rate=1e-3)
    shape = steps.recipe.model
    query, key = (torch.randn(*batch.token_ids.t().shape, heads, shape.head_dim) for heads in (shape.num_attention_heads, shape.num_query_groups))

    def line():
        steps.number += 1
        steps.log.line(steps.number, steps.told(plan, Progress().after(plan), outcome, 1.0, {}))

    def collect():
        observer.begin(detailed=False)
        observer.note_load()
        observer.collect()

    def detail():
        observer.begin(detailed=True)
        observer.before_update()
        observer.after_update(LR)

    trainer.accumulate([batch], steps.loss, mtp_weight=0.3, bias_update_rate=0.0)
    seen = smallest(lambda: LogitWatch().see(query, key, 0.1, batch.documents, 0, 1), repeats)
    return {
        "loss by part": smallest(lambda: steps.loss(losses, batch), repeats) - smallest(lambda: next_token_loss(losses, batch), repeats),
        "collected": smallest(collect, repeats), "line": smallest(line, repeats),
        "gradients and updates": smallest(detail, repeats), "logits": seen * len(observer.watches),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["tiny", "29m"], choices=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    every = Logging().detail_every_steps
    print(f"{date.today()}, {os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, one thread\n")
    in_turns, alone = [], []
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
            added = parts(steps, 2 * options.repeats)
        in_turns.append([shape, f"{rows * length:,}", *(f"{1000 * best[kind]:.1f}" for kind in KINDS)])
        plain = added["loss by part"] + added["collected"] + added["line"]
        mean = plain + (added["gradients and updates"] + added["logits"]) / every
        alone.append([shape, *(f"{1000 * seconds:.2f}" for seconds in added.values()), *(f"{seconds / best['bare']:.2%}" for seconds in (plain, mean))])
    print_table(["shape", "tokens", *(f"{kind}, ms" for kind in KINDS)], in_turns)
    print_table(["shape", *(f"{name}, ms" for name in added), "share of every step", f"share with one of {every} detailed"], alone)


def print_table(head: list[str], rows: list[list[str]]) -> None:
    for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows):
        print(f"| {' | '.join(cells)} |")
    print()


if __name__ == "__main__":
    main()
