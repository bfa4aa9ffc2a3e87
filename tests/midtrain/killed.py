"""The stage, forked from a process that has only imported it, and killed before one of its renames."""

import itertools
import os
import signal
import sys

from glm.recipe.schema import MidtrainPrepareRecipe
from midtrain.prepare import main


def endings(recipe: MidtrainPrepareRecipe, moments: list[int]) -> list[int]:
    """How starts of the stage end, one after the other; each is killed when it is about to rename its so-manieth file or folder."""
    return [_ending(recipe, moment) for moment in moments]


def _ending(recipe: MidtrainPrepareRecipe, moment: int) -> int:
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    renames = itertools.count(1)

    def kill(event: str, _: tuple) -> None:
        if event == "os.rename" and next(renames) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    try:
        main(recipe)
    finally:
        os._exit(1)
