"""Errors a user can act on. Each says where, what was found, what was expected, and what to do."""

import errno

REQUEUE_CODE = 75
"""What a stage exits with after it saved because the scheduler told it to stop (EX_TEMPFAIL): start it again, it continues."""

ROLLBACK_CODE = 76
"""What a stage exits with after it decided to go back to an earlier checkpoint: start it again, it does."""
HANG_CODE = 77
"""What a rank exits with that waited too long."""


class StageStopped(Exception):
    """A stage ends before its end, on purpose and on all ranks; the same command continues. ``code``: what to exit with."""

    def __init__(self, code: int, reason: str):
        self.code, self.reason = code, reason
        super().__init__(reason)


class UserError(ValueError):
    """A mistake of the user's or of the machine's, told in four parts. The command line prints it without a traceback."""

    exit_code = 2
    """Of a rank that ends with it; after 2 the launcher does not start the stage again."""

    def __init__(self, where: str, found: str, expected: str, todo: str):
        self.where, self.found, self.expected, self.todo = where, found, expected, todo
        super().__init__(
            f"{where}\n  found:    {found}\n  expected: {expected}\n  to do:    {todo}"
        )

    def __reduce__(self):  # survives the trip through a worker process
        return type(self), (self.where, self.found, self.expected, self.todo)


class RecipeError(UserError):
    """A recipe key, type or combination that cannot be run."""


class DataError(UserError):
    """A document, tokenizer or corpus that cannot be used."""


class DataWorkerError(UserError):
    """A process that reads data died or hangs. Nobody's mistake: starting the stage again is right, so it ends as a crash does."""

    exit_code = 1


class CheckpointError(UserError):
    """A checkpoint or weight file that is missing, torn or does not fit."""


class SaveError(UserError):
    """A checkpoint's writer died, or the storage failed it. Nobody's mistake either."""

    exit_code = 1


class PlatformError(UserError):
    """A device, package, port or process that is not there."""


class NumericsError(UserError):
    """A loss, gradient or probability that is not a usable number."""


class EngineError(UserError):
    """An inference engine that does not answer, or answers wrongly."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A disk, a quota or a file that has no room."""
_CLOSED = (errno.EROFS, errno.EACCES, errno.ENOTDIR)


def explain_os_error(error: OSError) -> PlatformError | None:
    """A full disk, or a place that cannot be written to, as the user's error it is; None for any other failure of the system."""
    reason = error.strerror or str(error)
    if error.errno in FULL:
        return PlatformError(
            str(error.filename or "a file of the run folder"), reason, "room on the disk",
            "make room and run the same command again; what was finished is intact",
        )
    if error.errno in _CLOSED and error.filename is not None:    # without a file it is a socket or a device: not to be explained here
        return PlatformError(
            str(error.filename), reason, "a place this user may read and write, below folders",
            "name another one (run_folder=PATH for a run), or change the permissions",
        )
    return None
