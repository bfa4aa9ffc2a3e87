"""YAML with the place of every value: what a recipe file says, and on which line.

Scalars follow YAML 1.2: only true and false are booleans (``wandb: off`` is the word off), ``1e-4`` is a number.
"""

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from glm.errors import RecipeError


@dataclass(frozen=True)
class Placed:
    """A value and where it was set. The value of a map is ``dict[str, Placed]``; scalars and lists are plain."""

    value: object
    origin: str

    @property
    def is_map(self) -> bool:
        return isinstance(self.value, dict)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+(?:_[0-9]+)*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:[0-9][0-9_]*)?\.?[0-9]+(?:\.)?(?:[eE][-+]?[0-9]+)?$"), list("-+0123456789.")
)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(node.value.replace("_", "")))


def read_yaml(path: Path) -> Placed:
    """The map a file holds. Raises RecipeError for a missing file, broken YAML, or a key set twice."""
    name = shown(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(name, "no such file", "a recipe file", _neighbours(path)) from None
    except IsADirectoryError:
        raise RecipeError(name, "a folder", "a recipe file", "name a .yaml file in it") from None
    except OSError as problem:
        raise RecipeError(name, f"not readable: {problem.strerror or problem}", "a recipe file",
                          "give yourself the right to read it, or name another file") from None
    except UnicodeDecodeError as problem:
        line = problem.object[: problem.start].count(b"\n") + 1
        raise RecipeError(f"{name}:{line}", f"byte 0x{problem.object[problem.start]:02x}, which is not UTF-8", "UTF-8 text",
                          "convert the file (iconv -t utf-8)") from None
    return parse_yaml(text, name)


def parse_yaml(text: str, name: str) -> Placed:
    """As read_yaml, for text; ``name`` is what the messages call it."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            placed = Placed({}, f"{name}:1") if node is None else _place(loader, node, name)
        finally:
            loader.dispose()
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        found = getattr(problem, "problem", None) or str(problem)
        raise RecipeError(where, found, "YAML", "mend the line named above") from None
    except RecursionError:
        raise RecipeError(name, "nested too deeply to be read", "YAML", "write it with fewer levels") from None
    if not placed.is_map:
        raise RecipeError(placed.origin, repr(placed.value), "a map of keys to values", "write `key: value` lines")
    return placed


def parse_value(text: str, origin: str) -> Placed:
    """A value from the command line, written as in a file: ``3``, ``15T``, ``{tp: 2}``, ``[a, b]``."""
    wrapped = parse_yaml(f"value: {text}", origin).value["value"]
    return _relocate(wrapped, origin)


def _relocate(placed: Placed, origin: str) -> Placed:
    if placed.is_map:
        return Placed({key: _relocate(child, origin) for key, child in placed.value.items()}, origin)
    return Placed(placed.value, origin)


def _place(loader: _Loader, node: yaml.Node, name: str) -> Placed:
    origin = f"{name}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        try:
            return Placed(loader.construct_object(node, deep=True), origin)
        except ValueError as problem:  # a number of thousands of digits, or a tag that does not fit its value
            raise RecipeError(origin, str(problem), "a YAML value", "correct the value") from None
    entries, lines = {}, {}
    for key_node, value_node in node.value:
        key, line = str(loader.construct_object(key_node, deep=True)), key_node.start_mark.line + 1
        if key in entries:
            raise RecipeError(
                f"{name}:{line}", f"{key!r} set a second time (first on line {lines[key]})", "each key once", "remove one of the two"
            )
        entries[key], lines[key] = _place(loader, value_node, name), line
    return Placed(entries, origin)


def merge(old: Placed | None, new: Placed) -> Placed:
    """``new`` over ``old``: maps key by key, scalars and lists whole; a map with another ``name`` replaces the old one."""
    if old is None or not (old.is_map and new.is_map):
        return new
    renamed = "name" in new.value and "name" in old.value and new.value["name"].value != old.value["name"].value
    if renamed:
        return new
    merged = dict(old.value)
    for key, child in new.value.items():
        merged[key] = merge(merged.get(key), child)
    return Placed(merged, new.origin)


def plain(placed: Placed) -> object:
    """The values without their places."""
    return {key: plain(child) for key, child in placed.value.items()} if placed.is_map else placed.value


def origins(placed: Placed, prefix: str = "") -> dict[str, str]:
    """``{"optimizer.momentum": "stage/x.yaml:12", ...}`` for every value that is not a map."""
    if not placed.is_map:
        return {prefix: placed.origin}
    found = {}
    for key, child in placed.value.items():
        found |= origins(child, f"{prefix}.{key}" if prefix else key)
    return found


def shown(path: Path) -> str:
    """A path as messages print it: relative to the current directory when it lies below."""
    absolute = os.path.abspath(path)
    inside = absolute.startswith(os.getcwd().rstrip(os.sep) + os.sep)
    return os.path.relpath(absolute) if inside else absolute


def nearest(word: str, known) -> str:
    """``did you mean `hidden_size`?`` or the list of what there is."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else f"there is: {', '.join(known) or 'nothing'}"


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {shown(path.parent)} either; name a file such as configs/glm45/tiny.yaml"
    return nearest(path.name, (other.name for other in path.parent.glob("*.yaml")))
