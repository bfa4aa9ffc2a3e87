"""Training on this machine: one step beside transformers, and a run with Muon beside the same run with AdamW.

    OMP_NUM_THREADS=1 python benchmarks/train.py step [--shapes 3m 29m tiny] [--repeats 12]
    python benchmarks/train.py optimizers [--folder runs/30m] [--figure docs/muon.svg] [--skip-runs]

step: our host path against transformers, same weights, same batch. Both sides run forward, backward, global-norm clip and optimizer in float32 on one thread, in turns (A B A B …); what counts
is the smallest CPU time of each (user and system, so that other work on the machine does not). Ours is
``glm.train.step.Trainer`` as a stage uses it: megatron's GPTModel, DistributedDataParallel with its fp32 gradient buffers,
schedule, and deterministic algorithms. Theirs is ``Glm4MoeForCausalLM`` with ``experts_implementation="grouped_mm"``, sdpa,
``cross_entropy``, ``zero_grad(set_to_none=True)`` and torch's defaults. Neither has an MTP layer or a balance loss here.

Optimizers: ``adamw`` is torch's ``clip_grad_norm_`` and fused AdamW, the same object on both sides; ``muon`` is this suite's
on both, over the same matrices. Loss and gradient norm of the first step must agree, or the benchmark stops.

The second table is the cost of MTP: our step with the MTP layer over the step without, and that over the ratio of
``glm.model.size.training_flops_per_token``. Balance loss and bias updates are on there, as in pretraining.

optimizers: configs/glm45/30m.yaml twice, as it is and with ``optimizer: {name: adamw}`` at AdamW's own learning rate: same text in the same
order, same initial weights, same held-out rows. Runs go on where they were stopped. Prints the validation losses at equal tokens and draws them.
"""

import argparse
import gc
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from glm.checkpoint.run_folder import RunFolder
from glm.metrics.read import read_lines
from glm.model.size import parameters, training_flops_per_token
from glm.recipe.schema import TrainRecipe
from glm.recipe.sections import Model, Muon
from glm.weights import one_rank

ROTARY_BASE, LR, CLIP = 10_000, 1e-5, 1.0
_SMALL = dict(num_dense_layers=1, num_attention_heads=8, num_query_groups=2, head_dim=32, qk_norm=True, experts_per_token=4,
              routed_scaling_factor=2.5, num_mtp_layers=0, max_position=2048)
SHAPES = {
    "3m": Model(num_layers=6, hidden_size=128, dense_ffn_size=512, expert_ffn_size=64, num_experts=16, vocab_size=2048, **_SMALL),
    "29m": Model(num_layers=8, hidden_size=256, dense_ffn_size=1024, expert_ffn_size=128, num_experts=32, vocab_size=8192, **_SMALL),
    "tiny": Model(  # configs/glm45/model/tiny.yaml
        num_layers=4, num_dense_layers=1, hidden_size=128, dense_ffn_size=384, expert_ffn_size=96, num_attention_heads=4,
        num_query_groups=2, head_dim=32, qk_norm=True, num_experts=8, experts_per_token=2, routed_scaling_factor=2.5,
        num_mtp_layers=0, vocab_size=2048, max_position=2048,
    ),
}
BATCHES = {"3m": (4, 128), "29m": (4, 128), "tiny": (16, 64)}
"""Rows and length of the one micro-batch."""


class ClippedAdamW:
    """torch's global-norm clip and fused AdamW over all ``params``, with the gradients found by ``gradient(param)``."""

    def __init__(self, params, gradient):
        self.params, self.gradient = list(params), gradient
        self.adamw = torch.optim.AdamW(self.params, lr=LR, weight_decay=0.1, fused=True)

    def step(self, lr: float) -> float:
        for param in self.params:
            param.grad = self.gradient(param)
        norm = torch.nn.utils.clip_grad_norm_(self.params, CLIP)
        self.adamw.step()
        for param in self.params:
            param.grad = None
        return norm.item()


class Ours:
    """A Trainer on one rank."""

    def __init__(self, shape: Model, optimizer: str, length: int, balanced: bool):
        from glm.train.batch import plain_batch
        from glm.model.chunks import named_parameters
        from glm.train.losses import next_token_loss
        from glm.train.step import Trainer

        recipe = TrainRecipe(
            name="benchmark", stage="benchmark", main="pretrain.train", run_folder="unused", model=shape, platform="host",
            sequence_length=length, rotary_base=ROTARY_BASE, batch={"tokens": length}, tokens=length,
            schedule={"peak_lr": LR, "final_lr": LR}, precision={"params": "fp32"}, kernels={"attention": "sdpa", "experts": "host"},
            losses={"sequence_balance_weight": 1e-4 if balanced else 0.0},
            data={"mixture": "unused", "sources": {"prose": {"corpus": "prose", "share": 1.0}}},
        )
        self.trainer, self.balanced = Trainer(recipe), balanced
        if optimizer == "adamw":
            self.trainer.optimizer = ClippedAdamW((param for _, param in named_parameters(self.trainer.chunks)), lambda param: param.main_grad)
        self.plain_batch, self.loss = plain_batch, next_token_loss

    def save(self, shape: Model, folder: Path) -> None:
        """The weights as a folder that transformers reads."""
        from glm.weights.gather import hf_tensors
        from glm.weights.hf_config import config_json
        from transformers import Glm4MoeConfig

        folder.mkdir()
        Glm4MoeConfig(**config_json(shape, rotary_base=ROTARY_BASE, params="fp32")).save_pretrained(folder)
        save_file({name: tensor.clone() for name, tensor in hf_tensors(self.trainer.chunks, shape)}, folder / "model.safetensors")

    def step(self, ids: torch.Tensor) -> tuple[float, float]:
        """(mean loss, gradient norm) of ``ids`` [B, S + 1]."""
        torch.use_deterministic_algorithms(True)
        rows = list(ids[:, :-1]), list(ids[:, 1:]), [torch.ones(ids.shape[1] - 1)] * len(ids)
        outcome = self.trainer.step(
            [self.plain_batch(*rows, ids.device)], self.loss, lr=LR, mtp_weight=0.3, bias_update_rate=1e-3 if self.balanced else 0.0,
        )
        return outcome.metrics["loss"], outcome.grad_norm


class Theirs:
    """transformers, trained by a plain loop."""

    def __init__(self, shape: Model, folder: Path, optimizer: str):
        from transformers import Glm4MoeForCausalLM

        self.model = Glm4MoeForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm",
        ).train()
        self.optimizer = self._muon(shape) if optimizer == "muon" else ClippedAdamW(self.model.parameters(), lambda param: param.grad)

    def _muon(self, shape: Model):
        """This suite's optimizer, told by our names which of their tensors is what."""
        from glm.optim.build import TrainOptimizer

        ours = {"embed_tokens": "word_embeddings", "lm_head": "output_layer", ".gate.": ".router.",
                "experts.gate_up_proj": "experts.weight1", "experts.down_proj": "experts.weight2"}
        named = []
        for name, param in self.model.named_parameters():
            for theirs, mine in ours.items():
                name = name.replace(theirs, mine)
            param.is_stacked_expert = param.dim() == 3
            named.append((name, param))
        return TrainOptimizer(named, Muon(), shape)

    def step(self, ids: torch.Tensor) -> tuple[float, float]:
        torch.use_deterministic_algorithms(False)
        logits = self.model(input_ids=ids[:, :-1].contiguous(), use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        for param in self.model.parameters():
            param.main_grad = param.grad    # where our optimizer looks
        norm = self.optimizer.step(LR)
        for param in self.model.parameters():
            param.grad = param.main_grad = None
        return loss.item(), norm


def smallest_seconds(steps: dict, ids: torch.Tensor, repeats: int) -> dict[str, float]:
    """CPU-seconds of the fastest step of each, after two to warm up, taking turns."""
    best = dict.fromkeys(steps, float("inf"))
    for turn in range(repeats + 2):
        for name, one in steps.items():
            started = time.process_time()
            one.step(ids)
            if turn >= 2:
                best[name] = min(best[name], time.process_time() - started)
    return best


def random_ids(shape: Model, batch: tuple[int, int]) -> torch.Tensor:
    return torch.randint(shape.vocab_size, (batch[0], batch[1] + 1), generator=torch.Generator().manual_seed(0))


def require_same(ours: tuple[float, float], theirs: tuple[float, float]) -> None:
    for what, mine, other in zip(("loss", "gradient norm"), ours, theirs):
        if abs(mine - other) > 1e-5 * abs(other):
            raise SystemExit(f"{what} of the first step differs: {mine} and {other}; not the same work")


def compare(name: str, optimizer: str, repeats: int) -> str:
    """One row of the first table."""
    shape, batch = SHAPES[name], BATCHES[name]
    ids = random_ids(shape, batch)
    ours = Ours(shape, optimizer, batch[1], balanced=False)
    with tempfile.TemporaryDirectory() as scratch:
        ours.save(shape, Path(scratch) / "model")
        theirs = Theirs(shape, Path(scratch) / "model", optimizer)
    require_same(ours.step(ids), theirs.step(ids))
    best = smallest_seconds({"ours": ours, "theirs": theirs}, ids, repeats)
    tokens = batch[0] * batch[1]
    return (f"| {name} ({parameters(shape).total / 1e6:.1f}M) | {batch[0]} x {batch[1]} | {optimizer} | {tokens / best['ours']:,.0f} "
            f"| {tokens / best['theirs']:,.0f} | {best['theirs'] / best['ours']:.2f} |")


def mtp_cost(name: str, repeats: int) -> str:
    """One row of the second table."""
    without, batch = SHAPES[name], BATCHES[name]
    with_mtp = without.model_copy(update={"num_mtp_layers": 1})
    best = smallest_seconds({
        "with": Ours(with_mtp, "muon", batch[1], balanced=True), "without": Ours(without, "muon", batch[1], balanced=True),
    }, random_ids(without, batch), repeats)
    measured = best["with"] / best["without"]
    predicted = training_flops_per_token(with_mtp, batch[1]) / training_flops_per_token(without, batch[1])
    return f"| {name} | {batch[0]} x {batch[1]} | {measured:.3f} | {predicted:.3f} | {measured / predicted:.2f} |"


def step(given: argparse.Namespace) -> None:
    one_rank.start(SHAPES["tiny"], platform="host")
    torch.set_num_threads(1)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, one thread, {packages}\n")
    print("| shape | tokens | optimizer | ours, tokens/CPU-s | transformers | ratio |\n| --- | --- | --- | ---: | ---: | ---: |")
    for name in given.shapes:
        for optimizer in given.optimizers:
            print(compare(name, optimizer, given.repeats), flush=True)
            gc.collect()
    print("\n| shape | tokens | step with MTP / without | FLOPs | measured / FLOPs |\n| --- | --- | ---: | ---: | ---: |")
    for name in given.shapes:
        print(mtp_cost(name, given.repeats), flush=True)
        gc.collect()


RUNFILE = Path(__file__).parents[1] / "configs" / "glm45" / "30m.yaml"
OPTIMIZERS = {
    "Muon": (),
    "AdamW": ("optimizer={name: adamw}", "pretrain_general.schedule.peak_lr=1.0e-3", "pretrain_general.schedule.final_lr=1.0e-4"),
}
"""What differs from the run file: the optimizer, and the learning rate that was best for it in short trials (docs/benchmarks.md)."""


def validation_losses(folder: Path) -> dict[int, float]:
    """{tokens seen: loss on held-out rows} of a run."""
    tokens, losses = 0, {}
    for line in read_lines(RunFolder(folder).metrics).records:
        tokens = line.get("train/stage_tokens", tokens)
        if "validation/loss" in line:
            losses[tokens] = line["validation/loss"]
    return losses


def optimizers(given: argparse.Namespace) -> None:
    folders = {name: given.folder / name.lower() for name in OPTIMIZERS}
    for name, changes in OPTIMIZERS.items():
        if not given.skip_runs:
            command = [sys.executable, "-m", "glm.cli", "run", str(RUNFILE), f"run_folder={folders[name]}", *changes]
            if subprocess.run(command).returncode != 0:
                raise SystemExit(f"the run with {name} failed; see above")
    losses = {name: validation_losses(folder) for name, folder in folders.items()}
    print("| tokens | " + " | ".join(losses) + " | difference |\n| ---: |" + " ---: |" * (len(losses) + 1))
    for tokens in sorted(set.intersection(*map(set, losses.values()))):
        muon, adamw = (losses[name][tokens] for name in OPTIMIZERS)
        print(f"| {tokens:,} | {muon:.4f} | {adamw:.4f} | {muon - adamw:+.4f} |")
    final = min(losses["AdamW"].values())
    ahead = [tokens for tokens, loss in losses["Muon"].items() if loss <= final]
    if ahead:
        print(f"\nMuon has AdamW's best loss ({final:.4f}) after {min(ahead):,} tokens, AdamW after {max(losses['AdamW']):,}.")
    draw(losses, given.figure)


def draw(losses: dict[str, dict[int, float]], path: Path) -> None:
    """The losses over tokens as an SVG without a date in it: the same runs give the same file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "glm", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
    for (name, curve), colour in zip(losses.items(), ("#1f5fbf", "#c0561a")):
        axes.plot([tokens / 1000 for tokens in curve], list(curve.values()), marker="o", markersize=3, color=colour, label=name)
    axes.set(xlabel="thousand tokens", ylabel="validation loss", title="30M sibling, same recipe, same text in the same order")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    print(f"\n{path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("step", help="one step beside transformers")
    one.set_defaults(run=step)
    one.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    one.add_argument("--optimizers", nargs="+", choices=("adamw", "muon"), default=["adamw", "muon"])
    one.add_argument("--repeats", type=int, default=12, help="steps that count, of each side")
    two = commands.add_parser("optimizers", help="a run with Muon beside one with AdamW")
    two.set_defaults(run=optimizers)
    two.add_argument("--folder", type=Path, default=Path("runs/30m"), help="where the two run folders are")
    two.add_argument("--figure", type=Path, default=Path(__file__).parents[1] / "docs" / "muon.svg")
    two.add_argument("--skip-runs", action="store_true", help="only read the run folders")
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
