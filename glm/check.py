"""What ``glm check`` prints: whether run files are valid, and what they amount to."""

import json
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from glm.data.budget import SourceBudget, stage_budgets, totals
from glm.errors import RecipeError, UserError
from glm.model.size import kv_bytes_per_token, parameters, training_flops_per_token
from glm.optim.flops import step_flops
from glm.plan.memory import StageStates, build_states, fits, least_ranks, room_bytes, stage_memory, suggest
from glm.recipe.compose import Run, load_run
from glm.recipe.schema import ModelStageRecipe, TrainRecipe
from glm.recipe.source import shown
from glm.show.text import console, short
from glm.train.plan import Progress, count_steps, data_parallel_size, plan_step, progress_at

BYTES = {"fp32": 4, "bf16": 2}
LENGTHS = (4096, 32_768, 131_072)
"""Sequence lengths a FLOP count is always given for, where the model reaches them; the stages' own come on top."""


def check_runs(files: list[str], changes: list[str], *, as_json: bool) -> int:
    """Reads every run file and prints what it amounts to. All are read; 2 if one is not valid, 1 if a stage does not fit its devices
    or would read a source more often than it may."""
    files = files or [str(path) for path in sorted(_configs().glob("*.yaml"))]
    runs, wrong = [], []
    for file in files:
        try:
            runs.append(load_run(file, changes))
        except UserError as problem:
            wrong.append(problem)
    trained = [{stage: recipe for stage, recipe in run.stages.items() if isinstance(recipe, ModelStageRecipe)} for run in runs]
    states = iter(build_states([recipe for recipes in trained for recipe in recipes.values()]))
    full = False
    for run, recipes in zip(runs, trained):
        built = {stage: next(states) for stage in recipes}
        memory = {stage: _memory(recipe, built[stage]) for stage, recipe in recipes.items()}
        full = full or any(entry["fits"] is False for entry in memory.values())
        budgets = [budget for recipe in recipes.values() if isinstance(recipe, TrainRecipe) for budget in stage_budgets(recipe)]
        full = full or any(budget.is_over for budget in budgets)
        data = [
            asdict(budget) | {"epochs": budget.epochs, "corpus_epochs": budget.corpus_epochs, "is_over": budget.is_over} for budget in budgets
        ]
        summary = summarize(run) | {"memory": memory, "data": data, "corpora": totals(budgets)}
        summary["muon"] = {stage: muon_share(recipe, built[stage]) for stage, recipe in recipes.items()}
        if as_json:
            print(json.dumps(summary))
        else:
            _print_summary(summary)
            print_muon(summary["muon"])
            print_memory(memory)
            print_budgets(budgets)
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        raise RecipeError(
            f"{len(wrong)} of {len(files)} run files", "\n\n".join(map(str, wrong)).replace("\n", "\n  "), "valid run files", "correct the above"
        )
    return int(full)


def summarize(run: Run) -> dict:
    """The numbers ``glm check`` prints of the model and its stages, as JSON values. ``flops_per_token`` maps sequence lengths to training FLOPs."""
    first = next(iter(run.stages.values()))
    model, counted = first.model, parameters(first.model)
    lengths = {length for length in LENGTHS if length <= model.max_position}
    stages = []
    for stage, recipe in run.stages.items():
        entry = {"stage": stage, "from": recipe.parent, "ranks": recipe.world_size}
        if isinstance(recipe, ModelStageRecipe):
            lengths.add(recipe.sequence_length)
            entry |= {
                "steps": count_steps(recipe), "sequence_length": recipe.sequence_length, "data_parallel": data_parallel_size(recipe),
                "flops_per_token": training_flops_per_token(model, recipe.sequence_length),
            }
        if isinstance(recipe, TrainRecipe):
            sources = {name: round(source.share * recipe.tokens) for name, source in recipe.data.sources.items()}
            entry |= {"tokens": recipe.tokens, "tokens_per_source": sources, "flops": entry["flops_per_token"] * recipe.tokens}
        stages.append(entry)
    return {
        "run": run.name, "file": shown(run.path),
        "parameters": {
            "total": counted.total, "total_without_mtp": counted.total_without_mtp, "active": counted.active, "router_bias": counted.router_bias,
            "conventions": {name: {"total": total, "active": active} for name, (total, active) in counted.conventions().items()},
        },
        "flops_per_token": {str(length): training_flops_per_token(model, length) for length in sorted(lengths)},
        "kv_bytes_per_token": kv_bytes_per_token(model, BYTES[first.precision.params]),
        "stages": stages,
    }


def muon_share(recipe: ModelStageRecipe, states: list[StageStates]) -> dict:
    """Orthogonalisation as a part of all floating-point operations of a step, at the stage's smallest and largest batch.

    ``share``: over the whole model. ``busiest_share``: on the rank that owns the costliest matrices, of its own operations; the others
    wait for it. Layouts that leave few owners, or one parameter far larger than the rest, show there.
    """
    ends = (0, recipe.tokens) if isinstance(recipe, TrainRecipe) else (0,)
    batches = sorted({plan_step(recipe, progress_at(recipe, end) if end else Progress()).tokens for end in ends})
    whole, busiest = step_flops(recipe.model, recipe.optimizer), max(stage.muon_flops for stage in states)
    trained = [training_flops_per_token(recipe.model, recipe.sequence_length) * tokens for tokens in batches]
    return {
        "flops": whole, "busiest_rank_flops": busiest, "batch_tokens": batches,
        "share": [whole / (whole + flops) for flops in trained],
        "busiest_share": [busiest / (busiest + flops / recipe.world_size) for flops in trained],
    }


def _memory(recipe: ModelStageRecipe, states: list[StageStates]) -> dict:
    """Bytes on the fullest rank of each pipeline stage, whether they fit, and what to change if not."""
    ranks = stage_memory(recipe, states)
    fitting = fits(recipe, ranks)
    better = suggest(recipe, states) if fitting is False else None
    return {
        "device": recipe.device.name, "room_bytes": room_bytes(recipe), "fits": fitting, "recompute": recipe.recompute,
        "least_ranks": least_ranks(recipe),
        "suggestion": None if better is None else {"change": better.change, "total_bytes": better.total},
        "ranks": [
            {
                "pipeline_rank": rank.states.pipeline_rank, "ranks": rank.states.ranks,
                "layers": sum(chunk.dense_layers + chunk.expert_layers for chunk in rank.states.chunks),
                "parameters": rank.states.parameters, "parameter_bytes": rank.states.parameter_bytes,
                "gradient_bytes": rank.states.gradient_bytes, "optimizer_bytes": rank.states.optimizer_bytes,
                "least_optimizer_bytes": rank.states.least_optimizer_bytes,
                "activation_bytes": rank.activations, "working_bytes": rank.working, "total_bytes": rank.total,
            }
            for rank in ranks
        ],
    }


def _print_summary(summary: dict) -> None:
    out, counted = console(), summary["parameters"]
    out.print(
        f"[bold]{summary['run']}[/] ({summary['file']}): valid; {counted['total']:,} parameters, {counted['active']:,} active, "
        f"{summary['kv_bytes_per_token'] / 1024:g} KiB of keys and values a token", highlight=False, soft_wrap=True,
    )
    sizes = Table("parameters of", "total", "active")
    for name, numbers in counted["conventions"].items():
        sizes.add_row(name, f"{numbers['total']:,}", f"{numbers['active']:,}")
    sizes.add_row("router bias (fp32, in none of the above)", f"{counted['router_bias']:,}", "")
    table = Table("stage", "from", "ranks", "steps", "tokens", "length", "FLOP a token", "FLOP", "tokens per source")
    for entry in summary["stages"]:
        sources = ", ".join(f"{name} {short(tokens)}" for name, tokens in entry.get("tokens_per_source", {}).items())
        table.add_row(
            entry["stage"], entry["from"] or "-", *(short(entry.get(key, "")) for key in ("ranks", "steps", "tokens", "sequence_length")),
            *(f"{entry[key]:.4g}" if key in entry else "" for key in ("flops_per_token", "flops")), sources,
        )
    out.print(sizes)
    costs = (f"{flops / 1e9:,.4g} GFLOP at {int(length):,}" for length, flops in summary["flops_per_token"].items())
    out.print(f"training a token: {', '.join(costs)} tokens of context", highlight=False, soft_wrap=True)
    out.print(table)


def print_muon(shares: dict[str, dict]) -> None:
    """A line for each group of stages in which Muon costs the same."""
    lines: dict[str, list[str]] = {}
    for stage, entry in shares.items():
        parts = (
            f"{share:.2%} of a step of {short(tokens)} tokens (busiest rank {busiest:.2%})"
            for tokens, share, busiest in zip(entry["batch_tokens"], entry["share"], entry["busiest_share"])
        )
        if entry["flops"]:
            lines.setdefault(f"{entry['flops']:.3g} FLOP a step, {', '.join(parts)}", []).append(stage)
    for line, stages in lines.items():
        console().print(f"Muon, {', '.join(stages)}: {line}", highlight=False, soft_wrap=True)


def print_memory(memory: dict[str, dict]) -> None:
    """One row a pipeline stage, in GB of 10^9 bytes, then a line for each stage that does not fit."""
    columns = ("parameter", "gradient", "optimizer", "activation", "working", "total")
    table = Table(
        "stage", "recompute", "pipeline", "ranks", "layers", "parameters", *(f"{name} GB" for name in columns), "fits",
        title="memory of the fullest rank of each pipeline stage", title_justify="left",
    )
    verdicts = {True: "yes", False: "[bold red]no[/]", None: ""}
    for stage, entry in memory.items():
        for rank in entry["ranks"]:
            fits_here = None if entry["room_bytes"] is None else rank["total_bytes"] <= entry["room_bytes"]
            table.add_row(
                stage, entry["recompute"], *(str(rank[key]) for key in ("pipeline_rank", "ranks", "layers")), short(rank["parameters"]),
                *(f"{rank[f'{name}_bytes'] / 1e9:.1f}" for name in columns), verdicts[fits_here],
            )
    out = console()
    out.print(table)
    for stage, entry in memory.items():
        if entry["fits"] is not False:
            continue
        fullest = max(entry["ranks"], key=lambda rank: rank["total_bytes"])
        better = entry["suggestion"]
        here, least = sum(rank["ranks"] for rank in entry["ranks"]), entry["least_ranks"]
        if better is not None:
            todo = f"set {' '.join(f'{stage}.{key}={value}' for key, value in better['change'].items())} ({better['total_bytes'] / 1e9:.1f} GB)"
        elif entry["room_bytes"] <= 0:
            todo = "the engines beside it leave nothing: lower engine.memory_fraction"
        elif least is not None and least > here:
            todo = f"with so much each, weights, gradients and optimizer state alone need {least} ranks, not {here}"
        else:
            todo = "no neighbouring layout fits: use more ranks, or shorter sequences"
        out.print(
            f"{stage} does not fit: {fullest['total_bytes'] / 1e9:.1f} GB on pipeline stage {fullest['pipeline_rank']}, "
            f"{entry['room_bytes'] / 1e9:.1f} GB free on {entry['device']}; {todo}", highlight=False, soft_wrap=True,
        )


def print_budgets(budgets: list[SourceBudget]) -> None:
    """One row a stage and source, then a line for each source that is read too often."""
    table = Table(
        "stage", "source", "corpus", "tokens asked", "tokens there", "epochs", "at most",
        title="data: what the mixtures ask for, and what there is", title_justify="left",
    )
    for budget in budgets:
        epochs = "" if budget.epochs is None else f"{budget.epochs:.2f}"
        table.add_row(
            budget.stage, budget.source, budget.corpus, short(budget.asked),
            "not prepared yet" if budget.there is None else short(budget.there),
            f"[bold red]{epochs}[/]" if budget.is_over else epochs, "" if budget.at_most is None else f"{budget.at_most:g}",
        )
    out = console()
    out.print(table)
    for corpus, epochs in totals(budgets).items():
        out.print(f"{corpus}: read {epochs:.2f} times over all stages", highlight=False, soft_wrap=True)
    over: dict[tuple[str, str], list[SourceBudget]] = {}
    for budget in budgets:
        if budget.is_over:
            over.setdefault((budget.stage, budget.reads), []).append(budget)
    for budget, *others in over.values():
        names = ", ".join(reader.source for reader in (budget, *others))
        sources, it = ("sources", "their one corpus") if others else ("source", "it")
        out.print(
            f"{budget.stage} reads {sources} {names} {budget.corpus_epochs:.2f} times, at most {budget.corpus_at_most:g} are allowed: "
            f"{it} has {short(budget.there)} tokens and would need {short(budget.least)}; "
            "lower the share or the stage's tokens, or give more documents", highlight=False, soft_wrap=True,
        )


def _configs() -> Path:
    return Path(__file__).parents[1] / "configs" / "glm45"
