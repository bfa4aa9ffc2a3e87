"""The versions everything was checked with. requirements/ installs the same ones; a test compares the two."""

PINNED: dict[str, str] = {
    "torch": "2.13.0",
    "megatron-core": "0.16.1",
    "sglang": "0.5.23",
    "transformers": "5.19.0",
    "datasets": "5.2.0",
    "pyarrow": "26.0.1",
    "psutil": "7.2.2",
    "sentencepiece": "0.2.3",
    "safetensors": "0.8.0",
    "pydantic": "2.14.3",
    "PyYAML": "6.0.3",
    "rich": "15.0.0",
    "matplotlib": "3.11.2",
    "wandb": "0.31.0",
}

BREAKS: dict[str, str] = {
    "torch": "nothing trains",
    "megatron-core": "the model cannot be built",
    "sglang": "rollouts, speculative decoding and chat",
    "transformers": "SGLang needs exactly this version; export cannot be verified",
    "datasets": "nothing here imports it: it brings pyarrow, and SGLang's metadata names it",
    "pyarrow": "parquet documents",
    "psutil": "saving a checkpoint waits for ever (megatron's filesystem_async), and SGLang does not start",
    "sentencepiece": "the tokenizer cannot be trained",
    "safetensors": "weights cannot be exported",
    "pydantic": "recipes cannot be read",
    "PyYAML": "recipes cannot be read",
    "rich": "progress bars and the tables of `glm show`",
    "matplotlib": "the report of a run",
    "wandb": "logging.wandb other than off",
}
"""What does not work without a package, or with another version of it."""

OPTIONAL = frozenset({"wandb"})
"""A run with the default recipe does without these."""

PLATFORM_TORCH: dict[str, str] = {"cuda": "2.14.1"}
"""Where a platform comes with another torch than the one pinned above (requirements/cuda.txt)."""
