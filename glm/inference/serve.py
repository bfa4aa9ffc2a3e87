"""What a server process runs: ``python -m glm.inference.serve`` with its settings as JSON on standard input.

Standard input rather than arguments, so that the API key is not in the process list. A mistake in the settings is
printed as a user's error, without a traceback, and ends the process with status 2.
"""

import json
import os
import signal
import sys
import threading
import time


def main() -> None:
    settings = json.load(sys.stdin)
    _die_with(settings["parent"])
    from glm.errors import UserError

    try:
        arguments = checked_arguments(settings["arguments"], settings["extra"])
        _launch(arguments, settings["platform"])
    except UserError as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
        sys.exit(2)


def checked_arguments(own: dict, extra: dict) -> dict:
    """``own`` and the recipe's escape map ``extra`` together, as fields of the installed ServerArgs.

    Raises RecipeError for a key that is no field, with the nearest one, and for a key the recipe already decides.
    """
    import difflib

    from sglang.srt.server_args import ServerArgs

    from glm.errors import RecipeError

    known = set(ServerArgs.__struct_fields__)
    assert set(own) <= known, f"not in this sglang: {sorted(set(own) - known)}"
    for key in extra:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise RecipeError(f"recipe key sglang.{key}", "no such field of ServerArgs in the installed sglang",
                              f"one of its fields{f', such as {near[0]}' if near else ''}", "correct or remove the key")
        if key in OWNED or key.startswith("speculative_"):
            raise RecipeError(f"recipe key sglang.{key}", "a value the recipe decides elsewhere",
                              "a field the recipe has no key for", "set it in the section engine, platform or precision")
    return own | extra


OWNED = {"model_path", "host", "port", "api_key", "device", "dtype", "tp_size", "random_seed", "nccl_port", "weight_version"}
"""Fields of ServerArgs that ServerSpec decides; every speculative_ field is one too."""


def _launch(arguments: dict, platform: str) -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    if platform == "host":
        from sglang.srt.model_executor import model_runner  # noqa: F401  importing it initialises the platform

        from glm.platform.host_sglang.hooks import verify_seams

        verify_seams()
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(**arguments)
    server_args.resolve_once()
    launch_server(server_args)


def _die_with(parent: int) -> None:
    """Kills the whole process group once ``parent`` is no longer this process's parent.

    Polling rather than PR_SET_PDEATHSIG: that signal also comes when only the *thread* that started this process ends,
    and it does not reach the grandchildren.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


if __name__ == "__main__":
    main()
