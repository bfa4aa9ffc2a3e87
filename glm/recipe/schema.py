"""One frozen type per kind of stage. Which one a stage file describes is decided by its ``main``."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from glm.recipe.midtrain import AgentCorpus, LongCorpus, ReasoningCorpus, RepositoryCorpus
from glm.recipe.raw import Deduplicate, RawData, RawSource, Semantic
from glm.recipe.sections import (
    AdamWAlone, Batch, Checkpoint, Data, Device, Engine, Evaluation, Guard, Kernels, Launcher, Layout, Logging, Losses, Model, Muon, Precision,
    Reinforcement, Rollout, Router, Schedule, Section, Tokenizer, Validation,
)
from glm.recipe.units import PositiveCount


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
"""Of a corpus."""


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


class PreparingRecipe(StageRecipe):
    """A stage that makes tokenized corpora which mixtures name as SOURCE/BUCKET."""

    workers: Annotated[int, Field(gt=0)] | None = None
    """Processes on each node; none: one a core. The result is the same for any number."""

    @property
    def prepares(self) -> tuple[str, ...]:
        """Names of its sources."""
        raise NotImplementedError


class PrepareRecipe(PreparingRecipe):
    """pretrain.prepare: raw sources to tokenized corpora by source and quality bucket."""

    data: RawData = RawData()
    sources: Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")], RawSource], Field(min_length=1)]
    """What is read. Stage and run file are merged by name."""
    order: tuple[str, ...] = ()
    """All sources: of two documents alike the one of the source that comes first stays. Filled in as the files name them."""
    shortest_characters: Annotated[int, Field(gt=0)] = 32
    """Shorter documents are dropped."""
    broken_limit: Annotated[int, Field(ge=0)] = 100
    """Records of one source that may be unreadable; they are counted and skipped, one more is an error."""
    deduplicate: Deduplicate = Deduplicate()
    semantic: Semantic | None = None
    task_bytes: PositiveCount = 64_000_000
    """Raw bytes one task reads. It decides how the corpora are cut into shards, not which documents they have."""
    plugins: tuple[str, ...] = ()
    """Modules that register scorers or embedders, imported before any is looked up."""

    @model_validator(mode="before")
    @classmethod
    def _in_order(cls, values: object) -> object:
        """The order is kept apart from the map, because the JSON of a recipe is sorted."""
        if not isinstance(values, dict) or not isinstance(values.get("sources"), dict):
            return values
        named = tuple(values.get("order") or ())
        unknown = [name for name in named if name not in values["sources"]]
        if unknown:
            raise ValueError(f"an order of the sources {', '.join(values['sources'])}, not of {', '.join(map(str, unknown))}")
        return values | {"order": (*named, *(name for name in values["sources"] if name not in named))}

    @property
    def prepares(self) -> tuple[str, ...]:
        return self.order


class MidtrainPrepareRecipe(PreparingRecipe):
    """midtrain.prepare: repositories, reasoning, long texts and agents' trajectories to tokenized corpora, by name and kind."""

    data: RawData = RawData()
    repositories: dict[Name, RepositoryCorpus] = {}
    reasoning: dict[Name, ReasoningCorpus] = {}
    long_documents: dict[Name, LongCorpus] = {}
    agents: dict[Name, AgentCorpus] = {}
    broken_limit: Annotated[int, Field(ge=0)] = 100
    """Records of one corpus that may be unreadable; they are counted and skipped, one more is an error."""

    @property
    def corpora(self) -> dict[str, RepositoryCorpus | ReasoningCorpus | LongCorpus | AgentCorpus]:
        return {**self.repositories, **self.reasoning, **self.long_documents, **self.agents}

    @property
    def prepares(self) -> tuple[str, ...]:
        return tuple(self.corpora)

    @model_validator(mode="after")
    def _names_its_corpora(self):
        given = [name for kind in (self.repositories, self.reasoning, self.long_documents, self.agents) for name in kind]
        if not given:
            raise ValueError("a corpus under repositories, reasoning, long_documents or agents")
        if twice := sorted({name for name in given if given.count(name) > 1}):
            raise ValueError(f"corpora of different names, not {', '.join(twice)} twice")
        return self


class ModelStageRecipe(StageRecipe):
    """A stage that trains weights."""

    sequence_length: PositiveCount
    rotary_base: PositiveCount
    batch: Batch
    optimizer: Muon | AdamWAlone = Muon()
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
    guard: Guard = Guard()
    validation: Validation = Validation()


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
    "pretrain.prepare": PrepareRecipe,
    "pretrain.train": TrainRecipe,
    "midtrain.prepare": MidtrainPrepareRecipe,
    "midtrain.train": TrainRecipe,
    "posttrain.sft": TrainRecipe,
    "posttrain.rl": RLRecipe,
    "posttrain.export": ExportRecipe,
    "posttrain.chat": ChatRecipe,
}
