"""The sections a recipe is made of. Each field says its meaning and, where it has one, its unit and source.

Imports neither torch nor megatron: a recipe can be read and checked anywhere.
"P" is the GLM-4.5 technical report (arXiv 2508.06471).
"""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from glm.recipe.units import Count, PositiveCount

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A frozen group of keys; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())


class Model(Section):
    """The shape of the network (P Table 1)."""

    num_layers: Positive
    """Transformer layers, dense ones included, the MTP layer not."""
    num_dense_layers: Annotated[int, Field(ge=0)]
    """How many of the first layers have a dense feed-forward instead of experts."""
    hidden_size: Positive
    dense_ffn_size: Positive
    """Inner width of the feed-forward of a dense layer."""
    expert_ffn_size: Positive
    """Inner width of one routed and of one shared expert."""
    num_attention_heads: Positive
    num_query_groups: Positive
    """Key/value heads."""
    head_dim: Positive
    """Given explicitly: it is not hidden_size / num_attention_heads."""
    qk_norm: bool
    """RMSNorm on every query and key head before the rotation. On in 355B, off in Air."""
    rotary_percent: Fraction = 0.5
    """Share of head_dim that is rotated, half-split pairing."""
    num_experts: Positive
    experts_per_token: Positive
    num_shared_experts: Annotated[int, Field(ge=0)] = 1
    routed_scaling_factor: Annotated[float, Field(gt=0)]
    """Factor on the renormalised routed weights: 2.5 in 355B, 1.0 in Air."""
    num_mtp_layers: Annotated[int, Field(ge=0, le=1)] = 1
    """Multi-token-prediction layers; SGLang serves at most one."""
    vocab_size: Positive
    max_position: Positive
    """Longest sequence the exported model declares."""
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    """Not given in P; the released configuration says 0.02."""

    @model_validator(mode="after")
    def _fits(self):
        if self.num_dense_layers > self.num_layers:
            raise ValueError(f"num_dense_layers {self.num_dense_layers} exceeds num_layers {self.num_layers}")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups {self.num_query_groups}")
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} exceeds num_experts {self.num_experts}")
        if int(self.head_dim * self.rotary_percent) % 2:
            raise ValueError(f"rotary dimension {self.head_dim * self.rotary_percent:g} is not even")
        return self


class Layout(Section):
    """How ranks are divided. Data parallelism takes what the others leave."""

    tp: Positive = 1
    """Tensor-parallel ranks (with sequence parallelism)."""
    pp: Positive = 1
    """Pipeline stages."""
    vpp: Positive = 1
    """Model chunks a pipeline stage holds (interleaved schedule); needs pp > 1."""
    pipeline_layers: tuple[int, ...] | None = None
    """Decoder layers of each of the pp x vpp chunks in the order of the network; none: evenly, fewer where head and MTP are."""
    cp: Positive = 1
    """Context-parallel ranks."""
    ep: Positive = 1
    """Expert-parallel ranks, taken from the tensor-, context- and data-parallel ones."""
    etp: Positive = 1
    """Tensor-parallel ranks inside one expert."""

    def layers_per_chunk(self, model: Model) -> tuple[int, ...]:
        """Decoder layers of each pipeline chunk in the order of the network; the last one also has head and MTP layer.

        Evenly where ``pipeline_layers`` does not say: the last chunk counts one layer more for its head and one for each MTP
        layer, and no chunk is left without a layer while there are enough.
        """
        if self.pipeline_layers is not None:
            return self.pipeline_layers
        chunks = self.pp * self.vpp
        if chunks == 1:
            return (model.num_layers,)
        units = model.num_layers + 1 + model.num_mtp_layers
        ends = [units * (index + 1) // chunks for index in range(chunks)]
        ends = [min(max(end, index + 1), model.num_layers - (chunks - 1 - index)) for index, end in enumerate(ends)]
        ends[-1] = model.num_layers
        return tuple(end - start for start, end in zip([0, *ends], ends))


class Launcher(Section):
    """Who starts the ranks."""

    kind: Literal["local", "slurm"] = "local"
    """local: torchrun on this machine. slurm: srun and torchrun inside a Slurm allocation."""
    nodes: Positive = 1
    ranks_per_node: Positive = 1
    threads_per_rank: Positive = 1
    timeout_seconds: Positive = 1800
    """A rank that waits longer for another, or in a step, gives up; all tell where they are, and stop. Rank 0 prepares the data of
    a stage while the others wait."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often in a row `glm run` starts a stage again whose ranks died or hung without having got further than before."""
    grace_seconds: Positive = 120
    """What ranks get to finish their step and to save when the scheduler says stop (SIGTERM, SIGUSR1); then they are killed."""


class Device(Section):
    """What one rank computes on, as far as `glm check` needs to know it."""

    name: str = "the machine's memory"
    memory_bytes: PositiveCount | None = None
    """Memory of one device; none: not checked."""
    reserved_bytes: Annotated[Count, Field(ge=0)] = 0
    """Part of it that no tensor gets: driver context, communication buffers, fragmentation. A choice, not a computed number."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Dense matrix products in the type of the parameters, 1e12 a second, by the data sheet; none: no MFU is logged."""


class Precision(Section):
    params: Literal["fp32", "bf16"] = "bf16"
    """Parameters and activations; gradients, optimizer state, router and its bias are fp32 always."""


class Kernels(Section):
    attention: Literal["sdpa", "te"] = "sdpa"
    """sdpa: torch alone, on a CPU and on a GPU. te: linear layers, norms and attention of transformer-engine."""
    experts: Literal["grouped_mm", "host", "te"] = "grouped_mm"
    """grouped_mm: one product over all experts. host: the same, and weight gradients expert by expert into the gradient buffer,
    for which the CPU must know the number of tokens of each: right where it is the CPU that computes. te: refused, see check.py."""


class TokenRamp(Section):
    """A value that rises linearly in run tokens and then stays."""

    start: PositiveCount
    end: PositiveCount
    over: PositiveCount
    """Run tokens the rise takes."""


class Batch(Section):
    tokens: TokenRamp | PositiveCount
    """Tokens of one optimizer step over all ranks: 16M to 64M over 500B (P 2.4)."""
    micro_batch_size: Positive = 1
    """Sequences one rank sends through the model at a time."""

    def tokens_at(self, run_tokens: int) -> float:
        if isinstance(self.tokens, int):
            return float(self.tokens)
        done = min(1.0, run_tokens / self.tokens.over)
        return self.tokens.start + (self.tokens.end - self.tokens.start) * done


class AdamW(Section):
    """For embeddings, output head, biases, norms and the router."""

    lr_ratio: NonNegative = 1.0
    """AdamW's learning rate over Muon's. Open in P; the shared update RMS of 0.2 suggests 1."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8


class Split(Section):
    """What Muon orthogonalises apart of parameters that are stored as one. Open in P."""

    qkv: Literal["separate", "per_head", "fused"] = "separate"
    """separate: the projections of queries, of keys and of values. per_head: every head of each (GLM-5's choice). fused: all as one."""
    gate_up: Literal["separate", "fused"] = "separate"
    """separate: gate and up of a feed-forward, dense, shared or expert. fused: both as one, as megatron does."""


class Muon(Section):
    """Muon on matrices, AdamW on the rest (P 2.4)."""

    name: Literal["muon"] = "muon"
    momentum: Fraction = 0.95
    nesterov: bool = True
    """Open in P; torch and Moonlight: yes, megatron: no."""
    newton_schulz_steps: Positive = 5
    coefficients: Literal["simple", "quintic", "polar_express"] = "simple"
    """Of the Newton-Schulz polynomials (glm/optim/newton_schulz.py). Open in P; simple is Moonlight's and torch's, quintic megatron's."""
    newton_schulz_dtype: Literal["fp32", "bf16"] = "fp32"
    """What the Newton-Schulz steps compute in; momentum and weights are fp32 always. Open in P. bf16, torch's choice, is several times
    faster on a GPU, halves what shards exchange, and changes an update by about 1 %."""
    update_rms: NonNegative = 0.2
    split: Split = Split()
    head: Literal["adamw", "muon"] = "adamw"
    """Rule of the output head. P excepts "word embedding, bias, and weights for RMSNorm" from Muon and does not name the head; AdamW as
    in Moonlight and megatron: its rows are classes, as the embedding's are, not directions of a hidden vector."""
    router: Literal["adamw", "muon"] = "adamw"
    """Rule of the routers' matrices, whose rows are classes too. Not named in P; megatron: muon."""
    weight_decay: NonNegative = 0.1
    clip_grad: NonNegative = 1.0
    """Largest global gradient norm; 0 does not clip. Open in P."""
    adamw: AdamW = AdamW()
    frozen: tuple[Literal["embedding", "output", "router", "mtp"], ...] = ()
    """Parameter groups that keep their value (used in RL)."""


class AdamWAlone(Section):
    """AdamW on everything, at the schedule's learning rate: the baseline Muon is compared with."""

    name: Literal["adamw"]
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: NonNegative = 0.1
    """Of matrices, embedding, head and routers; biases and norms have none."""
    clip_grad: NonNegative = 1.0
    """Largest global gradient norm; 0 does not clip."""
    frozen: tuple[Literal["embedding", "output", "router", "mtp"], ...] = ()
    """Parameter groups that keep their value."""


class Validation(Section):
    """Held-out documents, at the end of a stage and, if asked, on the way."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    """Steps between two validations; 0: only at the end."""
    rows: Positive = 32
    """Sequences, at least; every rank takes as many whole micro-batches."""


class Schedule(Section):
    """Warm-up, then one cosine. The clock is run tokens (over all stages) or this stage's own."""

    clock: Literal["run", "stage"] = "run"
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    peak_lr: NonNegative
    final_lr: NonNegative
    warmup: Annotated[Count, Field(ge=0)] = 0
    """Tokens from 0 to peak_lr."""
    decay_until: PositiveCount | None = None
    """Tokens at which final_lr is reached; none: the end of this stage."""


class Losses(Section):
    mtp_weight: NonNegative = 0.3
    """Weight of the MTP loss: 0.3 for 15T tokens, then 0.1 (P 2.4)."""
    sequence_balance_weight: NonNegative = 1e-4
    """Weight of the sequence-level balance loss (P 2.4). The pack of a micro-batch counts as one sequence."""


class Router(Section):
    bias_update_rate: NonNegative = 0.0
    """Step of the loss-free balancing bias: 1e-3 for 15T tokens, then 0 (P 2.4)."""


BUILT_IN_CORPORA = ("prose", "code", "repositories", "problems", "dialogues")
PREPARED_CORPUS = re.compile(r"[\w.-]+/[\w.-]+")


class Source(Section):
    """One source of a mixture."""

    corpus: str
    """prose, code, repositories, problems or dialogues, which every machine has; or NAME/BUCKET, made by a prepare stage of the run."""
    share: Annotated[float, Field(gt=0, le=1)]
    """Part of the stage's tokens that comes from here."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Most times a document may be read; none: as often as the share asks for."""

    @field_validator("corpus")
    @classmethod
    def _is_known(cls, corpus: str) -> str:
        if corpus not in BUILT_IN_CORPORA and not PREPARED_CORPUS.fullmatch(corpus):
            raise ValueError(f"one of {', '.join(BUILT_IN_CORPORA)}, or NAME/BUCKET of a prepare stage, not {corpus!r}")
        return corpus

    @property
    def is_prepared(self) -> bool:
        """Made by a prepare stage, and not by the stage that reads it."""
        return self.corpus not in BUILT_IN_CORPORA


def check_shares(sources: dict[str, Source]) -> None:
    """Raises ValueError unless the shares sum to 1."""
    total = sum(source.share for source in sources.values())
    if abs(total - 1) > 1e-6:
        parts = " + ".join(f"{source.share:g}" for source in sources.values()) or "no source"
        raise ValueError(f"shares that sum to 1, not {total:g} ({parts})")


class Data(Section):
    mixture: str
    """Name of a file in configs/*/mixture/."""
    sources: dict[str, Source] = {}
    """The contents of that file; filled in when the run file is read, so that the recipe stands alone."""
    packing: Literal["truncate", "best_fit"] = "truncate"
    """truncate: concatenate and cut (P 2.3, pretraining). best_fit: nothing that fits is cut, attention stays inside a document."""
    documents: str | None = None
    """The user's own text: a folder or file of text, jsonl or parquet. None: the running Python installation."""
    problems: PositiveCount = 20_000
    """How many procedurally generated problems to draw."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes a rank has to read the rows of the next step while the model computes; 0: the rank reads them when they are due."""
    worker_timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """How long a rank that waits for rows gets no answer from any such process before it names one and stops; at the start longer."""

    @model_validator(mode="after")
    def _sums_to_one(self):
        if self.sources:
            check_shares(self.sources)
        return self


class Guard(Section):
    """Which steps must not change the model (glm/train/guard.py). A loss or gradient norm that is not finite is refused always.
    P reports no spikes; the thresholds are our choice, far from anything a healthy run does."""

    window: Positive = 128
    """Steps looked back on."""
    history: Positive = 32
    """Healthy steps there must be before one is judged by them; at most ``window``."""
    loss_sigmas: NonNegative = 6.0
    """A loss this many standard deviations above the window's mean is a spike if it is also ...; 0: never."""
    loss_factor: NonNegative = 1.2
    """... this many times the window's largest."""
    grad_norm_factor: NonNegative = 50.0
    """A gradient norm this many times the window's median is a spike; 0: never. Smaller ones are what clipping is for."""
    skip_limit: Positive = 3
    """Refused steps within the window after which the stage goes back to the checkpoint before them."""
    rollback_limit: Annotated[int, Field(ge=0)] = 2
    """Times a stage may go back within ``rollback_window`` steps; then it stops. More may be given to a stage that stopped."""
    rollback_window: Positive = 10_000
    """Steps looked back on for that: what happened long ago says nothing of the model of now."""

    @model_validator(mode="after")
    def _can_be_filled(self):
        if self.history > self.window:
            raise ValueError(f"history (is {self.history}) at most window ({self.window})")
        return self


class Checkpoint(Section):
    every_steps: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints; 0 saves only at the end of the stage."""
    keep: Positive = 2
    """Newest checkpoints of the stage that are kept."""
    milestone_tokens: Annotated[Count, Field(ge=0)] = 0
    """At every multiple of so many run tokens a checkpoint is made and kept for ever; 0: none."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written; it is there some steps later. Needs room for a second copy of a rank's state."""


class Logging(Section):
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "glm45"
    every_steps: Positive = 1
    detail_every_steps: Annotated[int, Field(ge=0)] = 10
    """Steps between those that also measure gradient and update of every part, attention logits and every expert's load; 0: none."""
    dead_after_steps: Positive = 10
    """An expert is dead that got no token in so many steps."""

    def is_detailed(self, step: int) -> bool:
        """Whether the step with this number, from 1, measures everything; the first one does."""
        return bool(self.detail_every_steps) and (step == 1 or step % self.detail_every_steps == 0)


class Tokenizer(Section):
    vocab_size: Positive
    """All entries, control tokens included."""
    sample_bytes: PositiveCount = 8_000_000
    """Text the tokenizer is trained on."""


class Speculative(Section):
    """Speculative decoding with the model's own MTP layer (EAGLE, one candidate a position)."""

    num_steps: Annotated[int, Field(ge=0)] = 3
    """Draft tokens proposed a round; 0 decodes plainly."""


class Engine(Section):
    """The SGLang servers of a rollout."""

    num_servers: Positive = 1
    tp: Positive = 1
    speculative: Speculative = Speculative()
    context_length: Positive | None = None
    """Longest prompt plus reply; none: the model's."""
    max_running_requests: Positive = 128
    memory_fraction: Fraction = 0.8
    start_timeout_seconds: Positive = 180
    request_timeout_seconds: Positive = 300


class Rollout(Section):
    prompts_per_step: Positive
    group_size: Positive
    """Replies to one prompt; their mean reward is the baseline."""
    max_new_tokens: Positive
    temperature: Annotated[float, Field(gt=0)] = 1.0
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Weight updates a sample may lie behind; 0 is synchronous."""


class Reinforcement(Section):
    """GRPO without KL (P 3.2)."""

    name: Literal["grpo"] = "grpo"
    steps: Positive
    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.28
    normalize_std: bool = True
    """Divide the advantage by the group's standard deviation."""
    drop_uniform_groups: bool = True
    """Drop groups whose rewards are all alike; counted and logged."""
    environments: tuple[str, ...]
    """Names of registered environments; prompts are drawn evenly."""
    max_logprob_difference: NonNegative = 1e-3
    """Largest mean absolute difference of rollout and trainer logprobs before the run stops."""


class Evaluation(Section):
    """Held-out problems, never in any training text."""

    prompts: Positive = 240
    samples: Positive = 8
    """Sampled replies a prompt (avg@k)."""
    every_steps: Annotated[int, Field(ge=0)] = 0
    """0: before and after only."""
