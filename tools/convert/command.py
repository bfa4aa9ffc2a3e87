"""What the three converters share: their arguments' texts, and how a user's mistake ends them."""

import argparse
import sys
import warnings
from typing import Callable, get_args

from glm.errors import UserError, explain_os_error
from glm.recipe.schema import StageRecipe

PLATFORMS = get_args(StageRecipe.model_fields["platform"].annotation)


def parser(description: str, examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_platform(made: argparse.ArgumentParser) -> None:
    made.add_argument("--platform", choices=PLATFORMS, default="host", help="device to work on (default: host, the CPU)")


def add_workers(made: argparse.ArgumentParser) -> None:
    made.add_argument("--workers", type=int, default=2, help="threads that read, digest and write (default: 2)")


def add_copying(made: argparse.ArgumentParser) -> None:
    """What the two that copy byte ranges share."""
    add_workers(made)
    made.add_argument("--no-digests", action="store_true",
                      help="faster: neither prove what is read nor digest what is written; the manifest says so")


def add_stage(made: argparse.ArgumentParser) -> None:
    made.add_argument("--stage", help="stage of the run whose newest checkpoint is taken (default: the last that finished)")


def finish(work: Callable[[], str], platform: str | None = None) -> int:
    """Runs ``work`` and prints its one line; a user's mistake is told without a traceback. Returns the exit status.

    ``platform`` is activated first; work that builds no model needs none.
    """
    from glm import platform as platforms

    warnings.filterwarnings("ignore", module="megatron")  # of optional parts it misses and of torch names it still uses
    try:
        if platform is not None:
            platforms.activate(platform)  # before anything imports megatron
        print(work(), flush=True)
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        explained = explain_os_error(error)
        if explained is None:
            raise
        print(f"{type(explained).__name__}: {explained}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was published, and the same command continues", file=sys.stderr, flush=True)
        return 130
    return 0
