"""Quality scorers by name. A scorer turns texts into scores from 0, worthless, to 1; a recipe's ``plugins`` may register more."""

import hashlib
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
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


def judged_by(plugins: Sequence[str], qualities: Sequence[Quality]) -> dict[str, str]:
    """File -> digest, of all that scores and embeddings depend on: the code of the plug-ins, the files their options name."""
    files = []
    for plugin in plugins:
        module = import_module(plugin)
        files += sorted(file for folder in getattr(module, "__path__", ()) for file in Path(folder).rglob("*.py")) or [Path(module.__file__)]
    options = [option for quality in qualities for _, option in sorted(quality.options.items()) if isinstance(option, str)]
    files += [path for path in (Path(option).expanduser() for option in options) if path.is_file()]
    return {str(file): hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest() for file in files}


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
