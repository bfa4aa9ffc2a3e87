"""python -m tools.convert.to_hf RUN_OR_CHECKPOINT OUT: a checkpoint as a Hugging Face folder."""

import sys
from pathlib import Path

from tools.convert.command import add_stage, finish, parser

EXAMPLES = """\
  python -m tools.convert.to_hf runs/tiny exported                  the last finished stage, with the run's tokenizer
  python -m tools.convert.to_hf runs/tiny exported --stage sft_cold_start
  python -m tools.convert.to_hf runs/tiny/stages/rl_reasoning/checkpoints/step_00000060 exported
"""


def to_hf(*arguments, **options):
    """glm.convert.to_hf.to_hf, imported late: the platform must be active before, and the help answers without torch."""
    from glm.convert.to_hf import to_hf as work

    return work(*arguments, **options)


def main(arguments: list[str] | None = None) -> int:
    made = parser("Writes a checkpoint as a Hugging Face folder for transformers, SGLang and vLLM.", EXAMPLES)
    made.add_argument("source", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run's folder, or a step_* folder in it")
    made.add_argument("out", metavar="OUT", type=Path, help="new folder, or an earlier export to replace")
    add_stage(made)
    made.add_argument("--tokenizer", type=Path, help="tokenizer folder to copy (default: the run's)")
    made.add_argument("--with-copies", action="store_true",
                      help="repeat embedding and head in the MTP layer, as GLM-4.5's files do and GLM-4.6's do not")
    made.add_argument("--max-shard-bytes", type=int, default=5_000_000_000, help="largest weight file (default: 5e9)")
    given = made.parse_args(arguments)

    def work() -> str:
        written = to_hf(
            given.source, given.out, stage=given.stage, platform=given.platform, tokenizer=given.tokenizer,
            with_copies=given.with_copies, max_shard_bytes=given.max_shard_bytes,
        )
        return f"{given.out}: {written.tensors} tensors, {written.bytes:,} bytes"

    return finish(given.platform, work)


# The guard matters: megatron's checkpoint writer starts processes that import this module again.
if __name__ == "__main__":
    sys.exit(main())
