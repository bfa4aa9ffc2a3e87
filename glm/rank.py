"""What every rank of a stage runs: ``python -m glm.rank RECIPE_JSON`` under torchrun's environment variables."""

import importlib
import json
import signal
import sys
import warnings
from pathlib import Path


def run(recipe_path: Path) -> int:
    """Runs the recipe's main and returns the exit status; one that is not 0 is also left in the stage's folder."""
    try:
        code = _run(recipe_path)
    except BaseException:
        _leave_code(recipe_path, 1)
        raise
    if code:
        _leave_code(recipe_path, code)
    return code


def _leave_code(recipe_path: Path, code: int) -> None:
    """The first of the ranks writes; those after it lost their peer."""
    from glm.checkpoint.run_folder import RunFolder
    from glm.platform.ranks import place

    root, stage = recipe_path.absolute().parents[2], recipe_path.absolute().parent.name
    if RunFolder(root).recipe(stage) == recipe_path.absolute():    # started by hand from a recipe elsewhere: nobody waits for the file
        try:
            with RunFolder(root).exit(stage).open("x", encoding="utf-8") as out:
                json.dump({"code": code, "rank": place().rank}, out)
        except OSError:    # another rank was first, or the disk is full: what ended this rank is what to tell
            pass


def _run(recipe_path: Path) -> int:
    """Runs the recipe's main; returns the exit status. A user's mistake is told without a traceback."""
    from glm import platform
    from glm.errors import StageStopped, UserError, explain_os_error
    from glm.platform.lifetime import die_with_parent
    from glm.platform.ranks import place
    from glm.recipe.compose import load_recipe
    from glm.recipe.schema import ExportRecipe, ModelStageRecipe

    signal.signal(signal.SIGINT, signal.default_int_handler)    # ignored by inheritance if the launcher was started in the background
    die_with_parent()
    for upstream in (r"megatron\.", r"torch\.distributed"):  # optional packages that are absent, names that will change
        warnings.filterwarnings("ignore", module=upstream)
    try:
        recipe = load_recipe(recipe_path)
        if isinstance(recipe, (ModelStageRecipe, ExportRecipe)):
            platform.activate(recipe.platform, place().local_rank)
        importlib.import_module(recipe.main).main(recipe)
    except UserError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:
        explained = explain_os_error(error)
        if explained is None:
            raise
        print(f"\n{type(explained).__name__}: {explained}", file=sys.stderr, flush=True)
        return 2
    except StageStopped as stopped:
        if place().rank == 0:
            print(f"{recipe.stage}: {stopped.reason}", flush=True)
        return stopped.code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
