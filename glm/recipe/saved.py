"""Recipes as JSON, and what tells two of them apart."""

import hashlib
import json
from pathlib import Path

from pydantic import ValidationError

from glm.errors import RecipeError
from glm.recipe.schema import RECIPE_OF_MAIN, StageRecipe

NOT_PART_OF_THE_RESULT = (
    "name", "run_folder", "logging", "launcher.kind", "launcher.timeout_seconds", "launcher.max_restarts", "launcher.grace_seconds",
    "checkpoint", "engine.start_timeout_seconds", "engine.request_timeout_seconds", "device", "recompute", "workers", "validation",
    "data.workers", "data.worker_timeout_seconds", "guard.rollback_limit", "guard.rollback_window",
)
"""Keys that may change between two starts of the same stage."""
RESULT_UP_TO_ROUNDING = ("layout", "launcher", "platform", "kernels")
"""These may change too: the order of sums changes with them, and where the batch does not divide, by how much it is rounded."""


def dump_recipe(recipe: StageRecipe) -> dict:
    """Everything a stage runs with, as JSON values; load_recipe reads it back equal."""
    return recipe.model_dump(mode="json", by_alias=True)


def load_recipe(path: str | Path) -> StageRecipe:
    """The recipe in a JSON file, as the type its ``main`` has. Raises RecipeError."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(str(path), "no such file", "a recipe.json written by `glm run`", "start the stage with `glm run`") from None
    except json.JSONDecodeError as problem:
        raise RecipeError(f"{path}:{problem.lineno}", problem.msg, "a recipe.json written by `glm run`", "remove the stage's folder") from None
    kind = RECIPE_OF_MAIN.get(values.get("main")) if isinstance(values, dict) else None
    if kind is None:
        raise RecipeError(str(path), "no known `main`", f"one of {', '.join(RECIPE_OF_MAIN)}", "start the stage with `glm run`")
    try:
        return kind.model_validate(values)
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise RecipeError(str(path), f"`{key}`: {first['input']!r}", first["msg"], "it was written by another version; remove it") from None


def fingerprint(recipe: StageRecipe) -> str:
    """Hex digest over every key that changes what the stage computes."""
    return _digest(_result_keys(recipe))


def chained_fingerprint(recipe: StageRecipe, parents: list[str]) -> str:
    """The fingerprint of a stage together with those of the stages it reads from."""
    return _digest([fingerprint(recipe), *parents])


def differing_keys(old: StageRecipe, new: StageRecipe, only: tuple[str, ...] = ()) -> list[str]:
    """``schedule.peak_lr: 0.001 -> 0.002`` for each key that makes the fingerprints differ, or for each below ``only``.

    Never those that are no part of the result.
    """
    before, after = (_below(_kept(recipe), only) if only else _result_keys(recipe) for recipe in (old, new))
    absent = "(not set)"
    keys = [key for key in dict.fromkeys([*before, *after]) if before.get(key, absent) != after.get(key, absent)]
    return [f"{key}: {before.get(key, absent)} -> {after.get(key, absent)}" for key in keys]


def flatten(values: dict, prefix: str = "") -> dict[str, object]:
    """Nested maps as dotted keys; an empty map stays a value."""
    flat = {}
    for key, value in values.items():
        dotted = f"{prefix}.{key}" if prefix else key
        flat |= flatten(value, dotted) if isinstance(value, dict) and value else {dotted: value}
    return flat


def _result_keys(recipe: StageRecipe) -> dict[str, object]:
    return _without(_kept(recipe), RESULT_UP_TO_ROUNDING)


def _kept(recipe: StageRecipe) -> dict[str, object]:
    return _without(flatten(dump_recipe(recipe)), NOT_PART_OF_THE_RESULT)


def _without(flat: dict[str, object], names: tuple[str, ...]) -> dict[str, object]:
    left_out = _below(flat, names)
    return {key: value for key, value in flat.items() if key not in left_out}


def _below(flat: dict[str, object], names: tuple[str, ...]) -> dict[str, object]:
    return {key: value for key, value in flat.items() if key in names or key.startswith(tuple(f"{name}." for name in names))}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
