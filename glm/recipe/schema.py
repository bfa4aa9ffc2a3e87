"""One frozen type per kind of stage. Which one a stage file describes is decided by its ``main``."""

from typing import Annotated, Literal

from pydantic import Field

from glm.recipe.sections import (
    Batch, Checkpoint, Data, Device, Engine, Evaluation, Kernels, Launcher, Layout, Logging, Losses, Model, Muon, Precision,
    Reinforcement, Rollout, Router, Schedule, Section, Tokenizer,
)
from glm.recipe.units import PositiveCount


class StageRecipe(Section):
    """What every stage has."""

    name: str
    """Name of the run."""
    stage: str
    """Name of the stage in the run file."""
    main: str
    """Module whose ``main`` runs the stage."""
    parent: str | None = Field(default=None, alias="from")
    """Stage whose result this one starts from."""
    run_folder: str
    seed: int = 0
    model: Model
    platform: Literal["host", "cuda"]
    launcher: Launcher = Launcher()
    precision: Precision = Precision()
    kernels: Kernels = Kernels()
    layout: Layout = Layout()
    device: Device = Device()
    logging: Logging = Logging()
    deterministic: bool = True

    @property
    def world_size(self) -> int:
        return self.launcher.nodes * self.launcher.ranks_per_node


class TokenizerRecipe(StageRecipe):
    """pretrain.tokenizer: text to a Hugging Face tokenizer folder."""

    tokenizer: Tokenizer
    data: Data


class ModelStageRecipe(StageRecipe):
    """A stage that trains weights."""

    sequence_length: PositiveCount
    rotary_base: PositiveCount
    batch: Batch
    optimizer: Muon = Muon()
    schedule: Schedule
    losses: Losses = Losses()
    router: Router = Router()
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it: nothing; the feed-forward (dense, experts); whole layers."""
    checkpoint: Checkpoint = Checkpoint()
    run_tokens_before: int = 0
    """Tokens of the pre- and mid-training stages this one builds on; filled in from the run file."""
    megatron: dict[str, object] = {}
    """Fields of megatron's TransformerConfig passed through; checked when the model is built."""


class TrainRecipe(ModelStageRecipe):
    """pretrain.train, midtrain.train, posttrain.sft: next-token training on a mixture."""

    tokens: PositiveCount
    data: Data


class RLRecipe(ModelStageRecipe):
    """posttrain.rl: reinforcement learning from verified rewards."""

    rl: Reinforcement
    rollout: Rollout
    engine: Engine = Engine()
    evaluation: Evaluation = Evaluation()
    sglang: dict[str, object] = {}
    """Fields of SGLang's ServerArgs passed through; checked when a server starts."""


class ExportRecipe(StageRecipe):
    """posttrain.export: the newest checkpoint of the parent as a Hugging Face folder, verified."""

    rotary_base: PositiveCount = 1_000_000
    verify_tokens: int = 64
    """Random tokens whose logits transformers and megatron must agree on."""
    verify_tolerance: float = 1e-4


class ChatRecipe(StageRecipe):
    """posttrain.chat: sample dialogues from the exported model through SGLang."""

    engine: Engine = Engine()
    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    max_new_tokens: int = 48
    sglang: dict[str, object] = {}


RECIPE_OF_MAIN: dict[str, type[StageRecipe]] = {
    "pretrain.tokenizer": TokenizerRecipe,
    "pretrain.train": TrainRecipe,
    "midtrain.train": TrainRecipe,
    "posttrain.sft": TrainRecipe,
    "posttrain.rl": RLRecipe,
    "posttrain.export": ExportRecipe,
    "posttrain.chat": ChatRecipe,
}
