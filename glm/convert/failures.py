"""What an error of the system means in the midst of a conversion."""

from contextlib import contextmanager
from typing import Iterator

from glm.errors import CheckpointError, explain_os_error


@contextmanager
def explained(tensor: str | None = None) -> Iterator[None]:
    """Raises CheckpointError for a file that is gone, naming ``tensor`` too, and PlatformError for a full or a closed disk."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(
            str(error.filename) if tensor is None else f"{error.filename}: {tensor}", "no such file, or no longer",
            "files that stay where they are until the conversion ends",
            "bring it back, or convert another checkpoint: training keeps only its newest",
        ) from error
    except OSError as error:
        told = explain_os_error(error)
        if told is None:
            raise
        raise told from error
