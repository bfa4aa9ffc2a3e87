"""Is the device there? Asked in a process of its own, so that the one who asks needs no torch: ``python -m glm.platform.probe NAME RANK``."""

import json
import subprocess
import sys

from glm.errors import PlatformError

PROBE_SECONDS = 120


def probe(name: str, local_rank: int) -> None:
    """Raises the PlatformError that rank ``local_rank`` of a node would meet on platform ``name``. Takes seconds: torch is imported."""
    command = [sys.executable, "-m", "glm.platform.probe", name, str(local_rank)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise PlatformError(
            f"recipe key platform: {name}", f"a device that does not answer in {PROBE_SECONDS} s", "an answer within seconds", "check the driver",
        ) from None
    if done.returncode == 0:
        return
    last = (done.stderr.strip().splitlines() or [f"the probe ended with code {done.returncode}"])[-1]
    try:
        parts = json.loads(done.stdout)
    except json.JSONDecodeError:    # it did not get as far as asking: torch is missing or broken
        parts = [f"recipe key platform: {name}", last, "a torch that can be imported and asked for its devices", "see `glm doctor`"]
    raise PlatformError(*parts)


def _ask(name: str, local_rank: int) -> int:
    from glm.platform import activate

    try:
        activate(name, local_rank)
    except PlatformError as missing:
        print(json.dumps([missing.where, missing.found, missing.expected, missing.todo]))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_ask(sys.argv[1], int(sys.argv[2])))
