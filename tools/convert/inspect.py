"""python -m tools.convert.inspect PATH [PATTERN]: what lies in a checkpoint or a Hugging Face folder."""

import json
import sys
from pathlib import Path

from tools.convert.command import add_stage, finish, parser

EXAMPLES = """\
  python -m tools.convert.inspect GLM-4.5-Air
  python -m tools.convert.inspect runs/tiny '*.router.*'
  python -m tools.convert.inspect runs/tiny/stages/pretrain_general/checkpoints/step_00000120
  python -m tools.convert.inspect exported --digests --json > exported.json
"""


def inspect(*arguments, **options):
    """glm.convert.inspect.inspect, imported late: the help answers without torch."""
    from glm.convert.inspect import inspect as work

    return work(*arguments, **options)


def main(arguments: list[str] | None = None) -> int:
    made = parser(
        "Lists the tensors of a checkpoint or of a Hugging Face folder with shape, type, bytes, file and digest, the sum of each "
        "part of the model, and what is odd. Reads headers only, unless digests are to be computed.", EXAMPLES,
    )
    made.add_argument("path", metavar="PATH", type=Path, help="a Hugging Face folder, a step_* folder, or a run's")
    made.add_argument("pattern", metavar="PATTERN", nargs="?", default="*", help="only tensors whose names match, such as '*.experts.*'")
    add_stage(made)
    made.add_argument("--digests", action="store_true",
                      help="read every byte: compute digests, compare with the manifest, find zeros and what is no number")
    made.add_argument("--json", action="store_true", help="one object, for scripts")
    given = made.parse_args(arguments)

    def work() -> str:
        found = inspect(given.path, given.pattern, stage=given.stage, digests=given.digests)
        return as_json(found) if given.json else as_text(found)

    return finish(work)


def as_json(found) -> str:
    totals = {part: dict(zip(("tensors", "numbers", "bytes"), sums)) for part, sums in found.totals().items()}
    tensors = [vars(entry) | {"shape": list(entry.shape), "files": list(entry.files)} for entry in found.entries]
    return json.dumps({
        "path": str(found.path), "kind": found.kind, **found.about, "totals": totals, "odd": list(found.odd),
        "carried": list(found.carried), "tensors": tensors,
    }, indent=1)


def as_text(found) -> str:
    """A line a tensor, a line a part, a line for each thing that is odd."""
    width = max((len(entry.name) for entry in found.entries), default=0)
    lines = [
        f"{entry.name:<{width}}  {entry.dtype:<13}  {'x'.join(map(str, entry.shape)) or 'number':>16}  {entry.nbytes:>15,}  "
        f"{_files(entry.files)}{'  ' + entry.digest[:16] if entry.digest else ''}"
        for entry in found.entries
    ]
    about = ", ".join(f"{key} {value}" for key, value in found.about.items())
    lines += ["", f"{found.path}: {found.kind}{f' ({about})' if about else ''}"]
    rows = [*found.totals().items(), ("together", tuple(map(sum, zip(*found.totals().values()))) or (0, 0, 0))]
    lines += [f"  {part:<16}  {tensors:>7,} tensors  {numbers:>19,} numbers  {size:>19,} bytes" for part, (tensors, numbers, size) in rows]
    lines += [f"  carried along: {', '.join(found.carried)}"] if found.carried else []
    lines += [f"  odd: {words}" for words in found.odd] or ["  nothing odd"]
    return "\n".join(lines).lstrip("\n")


def _files(files: tuple[str, ...]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more" if files else "no file"


if __name__ == "__main__":
    sys.exit(main())
