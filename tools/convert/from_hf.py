"""python -m tools.convert.from_hf HF_FOLDER CHECKPOINTS: a Hugging Face folder as a checkpoint."""

import sys
from pathlib import Path

from tools.convert.command import add_copying, finish, parser

EXAMPLES = """\
  python -m tools.convert.from_hf GLM-4.5-Air runs/mine/stages/base/checkpoints
      makes .../checkpoints/step_00000000, as if a stage named base had written it
  python -m tools.convert.from_hf GLM-4.5-Air-FP8 runs/mine/stages/base/checkpoints --workers 8
      from weights in FP8 blocks, which become bfloat16
"""


def from_hf(*arguments, **options):
    """glm.convert.from_hf.from_hf, imported late: the help answers without torch."""
    from glm.convert.from_hf import from_hf as work

    return work(*arguments, **options)


def main(arguments: list[str] | None = None) -> int:
    made = parser(
        "Turns a Hugging Face folder of GLM-4.5 weights into a checkpoint of this suite, without an optimizer state, for any "
        "layout. Builds no model and needs little memory. Killed or out of space, the same command continues.", EXAMPLES,
    )
    made.add_argument("hf_folder", metavar="HF_FOLDER", type=Path, help="config.json and safetensors files")
    made.add_argument("checkpoint_folder", metavar="CHECKPOINTS", type=Path, help="new folder; gets step_00000000")
    made.add_argument("--params", choices=("fp32", "bf16"), help="type to store (default: the folder's)")
    add_copying(made)
    given = made.parse_args(arguments)
    return finish(lambda: "written: " + str(from_hf(
        given.hf_folder, given.checkpoint_folder, params=given.params, digests=not given.no_digests, workers=given.workers,
    )))


if __name__ == "__main__":
    sys.exit(main())
