"""python -m tools.convert.verify CHECKPOINT HF_FOLDER: the proof that both hold the same model."""

import sys
from pathlib import Path

from tools.convert.command import add_platform, add_stage, add_workers, finish, parser

EXAMPLES = """\
  python -m tools.convert.verify runs/tiny/stages/sft_cold_start/checkpoints/step_00000024 exported
  python -m tools.convert.verify runs/tiny exported --tokens 256 --tolerance 1e-3
  python -m tools.convert.verify checkpoints GLM-4.5 --no-logits
"""


def verify(*arguments, **options):
    """glm.convert.verify.verify, imported late: the platform must be active before, and the help answers without torch."""
    from glm.convert.verify import verify as work

    return work(*arguments, **options)


def main(arguments: list[str] | None = None) -> int:
    made = parser(
        "Compares the bytes of a checkpoint and of a Hugging Face folder with their manifests and every tensor of both with "
        "each other, then the logits and the MTP loss that megatron and transformers compute from them. Ends with status 2 and "
        "names the worst tensors when they differ.", EXAMPLES,
    )
    made.add_argument("source", metavar="CHECKPOINT", type=Path, help="a run's folder, or a step_* folder in it")
    made.add_argument("hf_folder", metavar="HF_FOLDER", type=Path, help="its export")
    add_stage(made)
    add_platform(made)
    made.add_argument("--tokens", type=int, default=64, help="random tokens to compare logits on (default: 64)")
    made.add_argument("--tolerance", type=float, default=1e-4, help="largest absolute difference of a logit (default: 1e-4)")
    made.add_argument("--no-logits", action="store_true",
                      help="tensors only, in little memory: for a model that does not fit this machine twice in float32")
    add_workers(made)
    given = made.parse_args(arguments)

    def work() -> str:
        found = verify(
            given.source, given.hf_folder, stage=given.stage, platform=given.platform, num_tokens=given.tokens,
            tolerance=given.tolerance, logits=not given.no_logits, workers=given.workers,
        )
        rounded = f", {found.quantised} of them after rounding to FP8" if found.quantised else ""
        digests = "with the manifests' digests" if found.digests else "without digests, which a manifest lacks"
        told = f"{found.tensors} tensors ({found.bytes:,} bytes) equal{rounded}, {digests}"
        if found.max_logit_difference is None:
            return f"{told}; logits not compared"
        mtp = "" if found.mtp_loss_difference is None else f", MTP loss by {found.mtp_loss_difference:.2e}"
        return f"{told}; logits (up to {found.max_logit:.2f}) differ by at most {found.max_logit_difference:.2e}{mtp}"

    return finish(work, given.platform)


# The guard matters: megatron's checkpoint writer starts processes that import this module again.
if __name__ == "__main__":
    sys.exit(main())
