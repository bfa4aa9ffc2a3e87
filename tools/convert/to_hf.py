"""python -m tools.convert.to_hf RUN_OR_CHECKPOINT OUT: a checkpoint as a Hugging Face folder."""

import argparse
import sys
from pathlib import Path

from tools.convert.command import add_copying, add_stage, finish, parser

EXAMPLES = """\
  python -m tools.convert.to_hf runs/tiny exported                  the last finished stage, with the run's tokenizer
  python -m tools.convert.to_hf runs/tiny exported --stage sft_cold_start
  python -m tools.convert.to_hf runs/tiny/stages/rl_reasoning/checkpoints/step_00000060 exported
  python -m tools.convert.to_hf runs/tiny exported-fp8 --fp8
      matrices in FP8 blocks of 128 x 128, as SGLang serves them
"""


def to_hf(*arguments, **options):
    """glm.convert.to_hf.to_hf, imported late: the help answers without torch."""
    from glm.convert.to_hf import to_hf as work

    return work(*arguments, **options)


def main(arguments: list[str] | None = None) -> int:
    made = parser(
        "Writes a checkpoint as a Hugging Face folder for transformers, SGLang and vLLM. Builds no model and needs little memory. "
        "Killed or out of space, the same command continues.", EXAMPLES,
    )
    made.add_argument("source", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run's folder, or a step_* folder in it")
    made.add_argument("out", metavar="OUT", type=Path, help="new folder, or an earlier export to replace")
    add_stage(made)
    made.add_argument("--tokenizer", type=Path, help="tokenizer folder to copy (default: the imported model's, or the run's)")
    made.add_argument("--with-copies", action=argparse.BooleanOptionalAction,
                      help="repeat embedding and head in the MTP layer, as GLM-4.5's files do and GLM-4.6's do not "
                           "(default: as the imported folder had it)")
    made.add_argument("--fp8", action="store_true", help="matrices in FP8 blocks of 128 x 128")
    made.add_argument("--max-shard-bytes", type=int, default=5_000_000_000, help="largest weight file (default: 5e9)")
    add_copying(made)
    given = made.parse_args(arguments)

    def work() -> str:
        written = to_hf(
            given.source, given.out, stage=given.stage, tokenizer=given.tokenizer, with_copies=given.with_copies, fp8=given.fp8,
            max_shard_bytes=given.max_shard_bytes, digests=not given.no_digests, workers=given.workers,
        )
        kept = f"; not whole blocks, so not in FP8: {', '.join(written.kept)}" if written.kept else ""
        return f"{given.out}: {written.tensors} tensors, {written.bytes:,} bytes{kept}"

    return finish(work)


if __name__ == "__main__":
    sys.exit(main())
