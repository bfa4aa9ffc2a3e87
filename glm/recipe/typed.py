"""From a map with places to a frozen type; every complaint names the file and line it is about."""

from typing import TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from glm.errors import RecipeError
from glm.recipe.source import Placed, nearest, plain

T = TypeVar("T", bound=BaseModel)


def build(kind: type[T], placed: Placed, prefix: str = "") -> T:
    """``kind`` from ``placed``. Raises RecipeError for an unknown key, a missing one, or a wrong value."""
    check_keys(kind, placed, prefix)
    try:
        return kind.model_validate(plain(placed))
    except ValidationError as problem:
        raise _explain(problem, placed, prefix) from None


def check_keys(kind: type[BaseModel], placed: Placed, prefix: str = "") -> None:
    """Raises RecipeError for the first key of ``placed`` that ``kind`` does not have, at any depth."""
    if not placed.is_map:
        return
    fields = field_types(kind)
    for key, child in placed.value.items():
        dotted = f"{prefix}.{key}" if prefix else key
        if key not in fields:
            raise RecipeError(child.origin, f"unknown key `{dotted}`", f"a key of {kind.__name__}", nearest(key, fields))
        inner = _section_in(fields[key], child, dotted)
        if inner is None or not child.is_map:
            continue
        if get_origin(fields[key]) is dict:
            for name, entry in child.value.items():
                check_keys(inner, entry, f"{dotted}.{name}")
        else:
            check_keys(inner, child, dotted)


def field_types(kind: type[BaseModel]) -> dict[str, object]:
    """Keys as files spell them (``from``, not ``parent``) and their annotations."""
    return {field.alias or name: field.annotation for name, field in kind.model_fields.items()}


def _section_in(annotation: object, placed: Placed, dotted: str) -> type[BaseModel] | None:
    """The section type in an annotation such as ``TokenRamp | int``; none for plain values and free maps.

    Of variants (``Muon | AdamWAlone``) the one that ``placed`` names, the first where it names none. Raises RecipeError for a name
    that no variant has.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    sections = [part for part in get_args(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
    if len(sections) > 1 and placed.is_map and "name" in placed.value:
        named = {get_args(section.model_fields["name"].annotation)[0]: section for section in sections}
        name = placed.value["name"]
        if name.value not in named:
            raise RecipeError(name.origin, f"`{dotted}.name: {name.value}`", " or ".join(named), nearest(str(name.value), named))
        return named[name.value]
    return sections[0] if sections else None


def _explain(problem: ValidationError, placed: Placed, prefix: str) -> RecipeError:
    """The error that lies deepest in the file's own keys: the branch of a union that the value resembles most."""
    first = max(problem.errors(), key=lambda error: len(_follow(placed, error["loc"])[1]))
    spot, keys = _follow(placed, first["loc"])
    dotted = ".".join(([prefix] if prefix else []) + keys)
    if first["type"] == "missing":
        missing = ".".join(filter(None, (dotted, str(first["loc"][-1]))))
        return RecipeError(spot.origin, f"no `{missing}`", "a value for it", "set it in the file of the axis it belongs to")
    message = first["msg"].removeprefix("Value error, ").removeprefix("expected ")
    value = plain(spot)
    found = f"`{dotted}`" if spot.is_map else f"`{dotted}: {value}`"
    return RecipeError(spot.origin, found or "the file", message, "correct the value")


def _follow(placed: Placed, location: tuple) -> tuple[Placed, list[str]]:
    """The value a pydantic location points to, and its keys; parts that name union branches are skipped."""
    keys = []
    for part in location:
        if placed.is_map and str(part) in placed.value:
            placed = placed.value[str(part)]
            keys.append(str(part))
    return placed, keys
