"""Muon beside torch.optim.Muon on the same matrices: CPU time, the update itself, and what part of a training step it is.

    OMP_NUM_THREADS=1 python benchmarks/muon.py [--repeats 15]

The matrices are those of models of GLM-4.5's shape, as Hugging Face files hold them: q, k, v, o, gate, up and down of each expert. Ours is
``TrainOptimizer`` as a stage uses it (stacked experts, fused qkv and gate/up, split for orthogonalisation); theirs one tensor a matrix. Timed is
the Muon step alone: momentum, Nesterov, five Newton-Schulz steps, scale, weight decay, update; in turns (A B C …), one thread, the smallest
CPU time (user and system) of each.

torch orthogonalises in bfloat16, always. Its fp32 column is its own code with the rounding taken out (``Tensor.bfloat16`` does nothing), so that
both sides compute in the same precision. AdamW (fused) on the same matrices stands beside them for scale.

Errors are norms of differences over the norm of the update: to a float64 singular value decomposition, and to torch.optim.Muon's.
"""

import argparse
import platform
import time
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch

from glm.check import muon_share
from glm.optim.newton_schulz import polynomials
from glm.plan.memory import build_states
from glm.recipe.compose import load_run
from glm.recipe.schema import ModelStageRecipe
from glm.recipe.sections import Model, Muon
from glm.weights import one_rank

CONFIGS = Path(__file__).parents[1] / "configs" / "glm45"
LR, MOMENTUM, DECAY = 0.02, 0.95, 0.1
_GLM = dict(num_dense_layers=1, num_query_groups=2, qk_norm=True, experts_per_token=4, routed_scaling_factor=2.5, vocab_size=512, max_position=2048)
SHAPES = {
    "tiny": Model(num_layers=4, hidden_size=128, dense_ffn_size=384, expert_ffn_size=96, num_attention_heads=4, head_dim=32, num_experts=8, **_GLM),
    "30m": Model(num_layers=6, hidden_size=256, dense_ffn_size=1024, expert_ffn_size=128, num_attention_heads=8, head_dim=32, num_experts=40, **_GLM),
    "wide": Model(num_layers=2, hidden_size=1024, dense_ffn_size=2432, expert_ffn_size=304, num_attention_heads=8, head_dim=64, num_experts=8, **_GLM),
}
"""tiny, 30m: configs/glm45/model. wide: a fifth of 355B's widths."""


class Ours:
    """The optimizer of a stage over the matrices of one model; gradients of given seeds."""

    def __init__(self, shape: Model, dtype: str):
        from glm.model.build import build_chunks
        from glm.model.chunks import named_parameters
        from glm.model.config import transformer_config
        from glm.model.initialize import initialize
        from glm.optim.build import TrainOptimizer    # after the platform is active

        chunks = build_chunks(transformer_config(shape, params="fp32"), shape, rotary_base=10_000)
        initialize(chunks, seed=0, shape=shape)
        settings = Muon(newton_schulz_dtype=dtype, weight_decay=DECAY, momentum=MOMENTUM)
        self.optimizer = TrainOptimizer(named_parameters(chunks), settings, shape)
        self.params = list(self.optimizer.momenta)
        generator = torch.Generator().manual_seed(0)
        for param in self.params:
            param.main_grad = torch.randn(param.shape, generator=generator)

    def matrices(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """``tensors``, one a parameter, as the matrices that are orthogonalised."""
        from glm.optim.muon import split_matrices

        parts = [part for param, tensor in zip(self.params, tensors)
                 for part in split_matrices(self.optimizer.names[param], tensor, None, self.optimizer.fused)[0]]
        return [matrix for part in parts for matrix in part.reshape(-1, *part.shape[-2:]).unbind(0)]

    def step(self) -> None:
        self.optimizer._step_muon(LR)


class Theirs:
    """torch.optim.Muon, or AdamW, over the same matrices as separate parameters."""

    def __init__(self, ours: Ours, kind: str):
        self.params = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours.matrices(ours.params)]
        for param, gradient in zip(self.params, ours.matrices([param.main_grad for param in ours.params])):
            param.grad = gradient.clone()
        self.rounding = mock.patch.object(torch.Tensor, "bfloat16", lambda self: self.clone()) if kind == "fp32" else mock.patch.dict({})
        if kind == "adamw":
            self.optimizer = torch.optim.AdamW(self.params, lr=LR, weight_decay=DECAY, fused=True)
        else:
            self.optimizer = torch.optim.Muon(
                self.params, lr=LR, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw",
            )

    def matrices(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return tensors

    def step(self) -> None:
        with self.rounding:
            self.optimizer.step()


def smallest_seconds(sides: dict, repeats: int) -> dict[str, float]:
    """CPU-seconds of the fastest step of each, after one to warm up, taking turns."""
    best = dict.fromkeys(sides, float("inf"))
    for turn in range(repeats + 1):
        for name, side in sides.items():
            started = time.process_time()
            side.step()
            if turn:
                best[name] = min(best[name], time.process_time() - started)
    return best


def first_updates(side: Ours | Theirs) -> list[torch.Tensor]:
    """What the first step subtracts, without weight decay and learning rate; float64."""
    before = [matrix.detach().double() * (1 - LR * DECAY) for matrix in side.matrices(side.params)]
    side.step()
    return [(old - matrix.detach().double()) / LR for old, matrix in zip(before, side.matrices(side.params))]


def exact_update(gradient: torch.Tensor) -> torch.Tensor:
    """Of a first step, whose momentum is a multiple of the gradient."""
    u, s, vt = torch.linalg.svd(gradient.double() / gradient.double().norm(), full_matrices=False)
    for a, b, c in polynomials("simple", 5):
        s = a * s + b * s**3 + c * s**5
    return 0.2 * max(gradient.shape) ** 0.5 * (u * s) @ vt


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest of all matrices."""
    return max(((one - other).norm() / other.norm()).item() for one, other in zip(found, expected))


def compare(name: str, repeats: int) -> tuple[str, str]:
    """A row of the table of times, and one of the table of errors."""
    sides: dict = {f"ours {dtype}": Ours(SHAPES[name], dtype) for dtype in ("fp32", "bf16")}
    one = sides["ours fp32"]
    sides |= {f"torch {kind}": Theirs(one, kind) for kind in ("fp32", "bf16", "adamw")}
    exact = [exact_update(gradient) for gradient in one.matrices([param.main_grad for param in one.params])]
    updates = {label: first_updates(side) for label, side in sides.items() if label != "torch adamw"}
    best = smallest_seconds(sides, repeats)
    count, size = len(exact), sum(matrix.numel() for matrix in exact)
    times = " | ".join(f"{best[label] * 1000:.1f}" for label in ("ours fp32", "torch fp32", "ours bf16", "torch bf16", "torch adamw"))
    return (
        f"| {name} | {count} | {size / 1e6:.1f}M | {times} | {best['ours fp32'] / best['torch fp32']:.2f} | {best['ours bf16'] / best['torch bf16']:.2f} |",
        f"| {name} | " + " | ".join(f"{error(updates[label], exact):.1e}" for label in ("ours fp32", "ours bf16", "torch bf16"))
        + f" | {error(updates['ours fp32'], updates['torch bf16']):.1e} | {error(updates['ours bf16'], updates['torch bf16']):.1e} |",
    )


def shares() -> str:
    """Rows of the table of shares."""
    recipes: list[ModelStageRecipe] = [load_run(CONFIGS / f"{name}.yaml").stages["pretrain_general"] for name in ("355b", "air", "4b", "30m")]
    rows = []
    for recipe, states in zip(recipes, build_states(recipes)):
        entry = muon_share(recipe, states)
        for tokens, share, busiest in zip(entry["batch_tokens"], entry["share"], entry["busiest_share"]):
            rows.append(f"| {recipe.name} | {entry['flops']:.3g} | {tokens:,} | {share:.2%} | {busiest:.2%} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=15, help="steps that count, of each side")
    given = parser.parse_args()
    one_rank.start(SHAPES["tiny"], platform="host")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, one thread, torch {version('torch')}\n")
    print("| matrices of | number | parameters | ours fp32, ms | torch fp32 | ours bf16 | torch bf16 | AdamW | ours / torch, fp32 | bf16 |")
    print("| --- |" + " ---: |" * 9)
    errors = []
    for name in given.shapes:
        times, differences = compare(name, given.repeats)
        errors.append(differences)
        print(times, flush=True)
    print("\n| matrices of | ours fp32 to float64 | ours bf16 to float64 | torch to float64 | ours fp32 to torch | ours bf16 to torch |")
    print("| --- |" + " ---: |" * 5 + "\n" + "\n".join(errors), flush=True)
    print("\n| model | FLOP of Muon a step | tokens of a step | share of the step | on the busiest rank |\n| --- | ---: | ---: | ---: | ---: |")
    print(shares())


if __name__ == "__main__":
    main()
