"""Environments by name: where prompts come from and how a reply is scored."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from glm.data.problems import Problem
from glm.errors import RecipeError
from glm.rl.types import Environment


@dataclass(frozen=True)
class Prompt:
    """The messages a reply is asked for, and the problem it is scored by."""

    messages: tuple[dict[str, str], ...]
    problem: Problem

    @property
    def task(self) -> str:
        return self.problem.task


BUILT_IN = {"problems": "posttrain.environments.problems"}
"""Name -> module that registers it, imported when it is asked for."""
_registered: dict[str, Callable[[], Environment]] = {}


def register(name: str) -> Callable[[Callable[[], Environment]], Callable[[], Environment]]:
    """Class decorator: the class, called without arguments, is the environment ``name``."""

    def enter(make: Callable[[], Environment]) -> Callable[[], Environment]:
        _registered[name] = make
        return make

    return enter


def environment(name: str) -> Environment:
    """Raises RecipeError for a name nobody registered."""
    if name not in _registered and name in BUILT_IN:
        import_module(BUILT_IN[name])
    if name not in _registered:
        known = ", ".join(sorted({*BUILT_IN, *_registered}))
        raise RecipeError("rl.environments", repr(name), f"one of {known}", "correct the name, or register the environment")
    return _registered[name]()
