"""How tables and numbers are printed."""

from rich.console import Console

from glm.recipe.units import format_count


def console() -> Console:
    """As wide as the terminal; in a file wide enough that no row wraps."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def short(value: object) -> str:
    """Counts as recipes spell them where that is exact and short, else to five digits: 15T, 63.963M."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if not isinstance(value, int) or value < 10**6 or len(format_count(value)) <= 6:
        return format_count(value) if isinstance(value, int) else str(value)
    factor, suffix = next((factor, suffix) for factor, suffix in ((10**12, "T"), (10**9, "B"), (10**6, "M")) if value >= factor)
    return f"{value / factor:.5g}{suffix}"
