"""Quality scorers by name. A scorer turns texts into scores from 0, worthless, to 1; a recipe's ``plugins`` may register more."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Protocol

from glm.errors import RecipeError
from glm.recipe.raw import Quality


class Scorer(Protocol):
    """Called with a few hundred documents at a time, in several processes: a score depends on its text alone."""

    def __call__(self, texts: Sequence[str]) -> Sequence[float]: ...


BUILT_IN = {"heuristics": "pretrain.heuristics", "code": "pretrain.heuristics", "classifier": "pretrain.classifier"}
"""Name -> module that registers it, imported when it is asked for."""
_registered: dict[str, Callable[..., Scorer]] = {}


def register_scorer(name: str) -> Callable[[Callable[..., Scorer]], Callable[..., Scorer]]:
    """Decorator: what it is put on, called with the recipe's ``options``, is the scorer ``name``."""

    def enter(make: Callable[..., Scorer]) -> Callable[..., Scorer]:
        _registered[name] = make
        return make

    return enter


def import_plugins(modules: Sequence[str]) -> None:
    """Raises RecipeError for a module that is not there."""
    for module in modules:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            todo = "correct the name, or put its folder on PYTHONPATH"
            raise RecipeError("plugins", f"{module}: {error}", "a module that can be imported", todo) from error


def make_scorer(quality: Quality) -> Scorer:
    """Raises RecipeError for a name nobody registered, and for options it does not take."""
    name = quality.scorer
    if name not in _registered and name in BUILT_IN:
        import_module(BUILT_IN[name])
    if name not in _registered:
        known = ", ".join(sorted({*BUILT_IN, *_registered}))
        raise RecipeError("quality.scorer", repr(name), f"one of {known}", "correct the name, or name the module that registers it in `plugins`")
    try:
        return _registered[name](**quality.options)
    except TypeError as error:
        raise RecipeError(f"quality.options of {name}", str(error), "the options the scorer takes", "correct them") from error
