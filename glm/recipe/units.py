"""Counts as people write them: ``15T`` tokens, ``16M``, ``4_096``."""

from decimal import Decimal, InvalidOperation
from typing import Annotated

from pydantic import BeforeValidator, Field

_FACTORS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(value: object) -> int:
    """``"23.1T"`` -> 23_100_000_000_000. Whole numbers pass through. Raises ValueError for anything else."""
    if isinstance(value, bool):
        raise ValueError(f"expected a count such as 500B, 16M or 4096, found {value!r}")
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        text = value.strip().replace("_", "")
        factor = _FACTORS.get(text[-1:].upper(), 1)
        try:
            exact = Decimal(text[:-1] if factor > 1 else text) * factor
        except InvalidOperation:
            exact = None
        if exact is not None and exact.is_finite() and exact == int(exact):
            return int(exact)
    raise ValueError(f"expected a count such as 500B, 16M or 4096, found {value!r}")


def format_count(count: int) -> str:
    """The shortest exact spelling: 15_000_000_000_000 -> ``15T``, 4096 -> ``4096``."""
    for suffix, factor in reversed(_FACTORS.items()):
        scaled = Decimal(count) / factor
        if count and abs(scaled) >= 1 and scaled == round(scaled, 3):
            return f"{scaled.normalize():f}{suffix}" if count >= 10**6 else str(count)
    return str(count)


Count = Annotated[int, BeforeValidator(parse_count)]
"""A whole number of tokens, parameters or items; accepts ``15T`` and the like."""
PositiveCount = Annotated[Count, Field(gt=0)]
"""A count of at least one."""
