"""python -m tools.convert.verify CHECKPOINT HF_FOLDER: the proof that both hold the same model."""

import sys
from pathlib import Path

from tools.convert.command import add_platform, add_stage, finish, parser

EXAMPLES = """\
  python -m tools.convert.verify runs/tiny/stages/sft_cold_start/checkpoints/step_00000024 exported
  python -m tools.convert.verify runs/tiny exported --tokens 256 --tolerance 1e-3
"""


def verify(*arguments, **options):
    """glm.convert.verify.verify, imported late: the platform must be active before, and the help answers without torch."""
    from glm.convert.verify import verify as work

    return work(*arguments, **options)


def main(arguments: list[str] | None = None) -> int:
    made = parser(
        "Compares every tensor of a checkpoint with a Hugging Face folder, and the logits and the MTP loss that megatron and "
        "transformers compute from them. Ends with status 2 and names the worst tensors when they differ.", EXAMPLES,
    )
    made.add_argument("source", metavar="CHECKPOINT", type=Path, help="a run's folder, or a step_* folder in it")
    made.add_argument("hf_folder", metavar="HF_FOLDER", type=Path, help="its export")
    add_stage(made)
    add_platform(made)
    made.add_argument("--tokens", type=int, default=64, help="random tokens to compare logits on (default: 64)")
    made.add_argument("--tolerance", type=float, default=1e-4, help="largest absolute difference of a logit (default: 1e-4)")
    given = made.parse_args(arguments)

    def work() -> str:
        found = verify(
            given.source, given.hf_folder, stage=given.stage, platform=given.platform, num_tokens=given.tokens,
            tolerance=given.tolerance,
        )
        mtp = "" if found.mtp_loss_difference is None else f", MTP loss by {found.mtp_loss_difference:.2e}"
        return (f"{found.tensors} tensors equal; logits (up to {found.max_logit:.2f}) differ by at most "
                f"{found.max_logit_difference:.2e}{mtp}")

    return finish(work, given.platform)


# The guard matters: megatron's checkpoint writer starts processes that import this module again.
if __name__ == "__main__":
    sys.exit(main())
