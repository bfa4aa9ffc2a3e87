"""Errors a user can act on. Each says where, what was found, what was expected, and what to do."""


class UserError(ValueError):
    """A mistake of the user's or of the machine's, told in four parts. The command line prints it without a traceback."""

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


class CheckpointError(UserError):
    """A checkpoint or weight file that is missing, torn or does not fit."""


class PlatformError(UserError):
    """A device, package, port or process that is not there."""


class NumericsError(UserError):
    """A loss, gradient or probability that is not a usable number."""


class EngineError(UserError):
    """An inference engine that does not answer, or answers wrongly."""
