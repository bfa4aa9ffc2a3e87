"""Bytes of activations a rank keeps for the backward pass, by formula. Imports no torch.

Counted are the tensors autograd saves in our modules and megatron's (tests/plan/test_activations.py compares with what is
really saved). Per token of the rank's part of a row, e the bytes of a number, t tensor-parallel ranks, F a feed-forward's
inner width, K experts a token:

    norm of width w        e w, and 4 for the root mean square     (on the host in bf16, where it is not one kernel: 8 w + 4)
    attention              norm(H) / t + e H / t + 2 e (N + G) D / t [query, key, value, output] + 4 N / t + 4 e rotated
                           with a norm of query and key heads: 2 e (N + G) D / t + 4 (N + G) / t [the query's input, and qkv, which the
                           key's is a view of]; on the host in bf16 the norm of width (N + G) D
                           sdpa with documents or several rows: e N D / t [the output in the other order]
                           context parallel: keys and values of the whole row instead, 2 e G D cp / t
    dense feed-forward     e H / t + 3 e F / t          [input; gate and up, product]
    experts                e H / t + 3 e F / t [shared] + 4 H / t if e = 2 [router's fp32 input] + (13 E + 32 K + 16) / t [routing]
                           + K e (H + 2 F) / t          [a copy of the token for each of its experts; gate and up]
                           + K e H / t                  [the results, where experts are on other ranks: upstream's sum keeps them]
    head, and MTP's again  e H / t + e V + 4            [slope of the loss]; under tensor parallelism 4 V / t + 9, the softmax in fp32
    MTP layer              an expert layer + 3 norm(H) / t + 2 e H / t

Routing is taken as balanced: every rank of an expert group receives as many tokens as it sends. ``recompute: selective``
keeps of a feed-forward its input alone, ``full`` of a layer its input alone, and both do the rest again for one layer at a time.

A pipeline keeps several micro-batches: stage p of P those that have gone forward and not yet come back, min(P - p, all of
them); interleaved, the chunk forwards done before the first backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from glm.recipe.schema import ModelStageRecipe, RLRecipe

BYTES = {"fp32": 4, "bf16": 2}
HEAD_PIECE = 1 << 25
"""Logits that glm.model.head has in fp32 at a time (its CHUNK; a test compares)."""


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank."""

    kept: int
    """Saved by all forward passes that wait for their backward."""
    working: int
    """On top while one layer or the head is at work."""


@dataclass(frozen=True)
class Chunk:
    """What one model chunk of a pipeline stage holds."""

    dense_layers: int
    expert_layers: int
    embedding: bool
    head: bool
    mtp_layers: int


class _Formula:
    """Bytes of one micro-batch on one rank, piece by piece."""

    def __init__(self, recipe: ModelStageRecipe):
        self.recipe, self.model, self.layout = recipe, recipe.model, recipe.layout
        self.e = BYTES[recipe.precision.params]
        self.tokens = recipe.batch.micro_batch_size * recipe.sequence_length // self.layout.cp
        self.shared = self.tokens / self.layout.tp    # sequence parallel between, heads or inner width inside the blocks
        self.norm_keeps_input = recipe.platform != "host" or self.e == 4
        self.norm_bytes = self.e if self.norm_keeps_input else 8
        packed = isinstance(recipe, RLRecipe) or recipe.data.packing == "best_fit"
        self.copies_output = recipe.kernels.attention == "sdpa" and (packed or recipe.batch.micro_batch_size > 1)

    def norm(self, width: int) -> float:
        return self.shared * (self.norm_bytes * width + 4)

    def hidden(self) -> float:
        return self.shared * self.e * self.model.hidden_size

    def head_norms(self) -> float:
        model = self.model
        queries, keys = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
        means = 4 * (model.num_attention_heads + model.num_query_groups)
        if self.norm_keeps_input:
            return self.shared * (self.e * (2 * queries + 2 * keys) + means)    # a copy of the query's input; the key's keeps all of qkv
        return self.shared * (self.norm_bytes * (queries + keys) + means)

    def attention(self) -> float:
        model, e = self.model, self.e
        queries, keys = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
        kept = e * ((3 if self.copies_output else 2) * queries + 2 * keys * self.layout.cp) + 4 * model.num_attention_heads
        rotation = 4 * e * int(model.head_dim * model.rotary_percent) * self.tokens / self.recipe.batch.micro_batch_size
        return self.norm(model.hidden_size) + self.hidden() + self.shared * kept + rotation + (self.head_norms() if model.qk_norm else 0)

    def feed_forward(self, experts: bool) -> float:
        """What is kept inside, its input not counted."""
        model, e = self.model, self.e
        if not experts:
            return self.shared * 3 * e * model.dense_ffn_size
        used, hidden, inner = model.experts_per_token, model.hidden_size, model.expert_ffn_size
        routing = 13 * model.num_experts + 32 * used + 16 + (4 * hidden if e == 2 else 0)
        elsewhere = self.layout.ep > 1 or self.layout.etp > 1
        sent = used * e * ((2 if elsewhere and self.recipe.deterministic else 1) * hidden + 2 * inner)
        return self.shared * (3 * e * model.num_shared_experts * inner + routing + sent)

    def layer(self, experts: bool) -> float:
        return self.attention() + self.norm(self.model.hidden_size) + self.hidden() + self.feed_forward(experts)

    def layer_kept(self, experts: bool) -> float:
        """After the recipe's recompute."""
        if self.recipe.recompute == "full":
            return self.hidden()
        return self.layer(experts) - (self.feed_forward(experts) if self.recipe.recompute == "selective" else 0)

    def mtp_around(self) -> float:
        """What the MTP layer keeps beside its transformer layer: three norms, and their results joined."""
        return 3 * self.norm(self.model.hidden_size) + 2 * self.hidden()

    def mtp_kept(self) -> float:
        return 2 * self.hidden() if self.recipe.recompute == "full" else self.layer_kept(experts=True) + self.mtp_around()

    def head(self) -> float:
        if self.layout.tp == 1:
            return self.hidden() + self.tokens * (self.e * self.model.vocab_size + 4)
        return self.hidden() + self.shared * 4 * self.model.vocab_size + self.tokens * 9

    def logits(self) -> float:
        """While the head is at work, on top of what it keeps: glm.model.head works in pieces, and in fp32 in place."""
        if self.layout.tp > 1:
            return self.shared * self.e * self.model.vocab_size
        return 0.0 if self.e == 4 else 6 * min(self.tokens * self.model.vocab_size, HEAD_PIECE)

    def chunk(self, held: Chunk) -> float:
        kept = held.dense_layers * self.layer_kept(False) + held.expert_layers * self.layer_kept(True)
        return kept + held.mtp_layers * self.mtp_kept() + 8 * self.tokens * held.embedding + self.heads(held)

    def heads(self, held: Chunk) -> float:
        return self.norm(self.model.hidden_size) + (1 + held.mtp_layers) * self.head() if held.head else 0.0

    def working(self, held: Chunk) -> float:
        """Of the moment that needs most: the logits; or a layer done again, with the
        gradients inside it, when what the head kept is gone."""
        needs = [self.logits() if held.head else 0.0]
        again = {experts: self.layer(experts) - self.layer_kept(experts) for experts in (False, True)}
        if held.dense_layers:
            needs.append(again[False] + self.gradients(False) - self.heads(held))
        if held.expert_layers:
            needs.append(again[True] + self.gradients(True) - self.heads(held))
        if held.mtp_layers:
            whole = self.layer(True) + self.mtp_around() - self.mtp_kept()
            needs.append(whole + self.gradients(True) - self.heads(held))
        return max(needs)

    def gradients(self, experts: bool) -> float:
        """Gradients and what is made again at the widest place of a layer: inside its feed-forward, beside four of the layer's width."""
        model, e = self.model, self.e
        if not experts:
            return 4 * self.hidden() + self.shared * e * 5 * model.dense_ffn_size
        return 4 * self.hidden() + self.shared * e * model.experts_per_token * (2 * model.hidden_size + 5 * model.expert_ffn_size)


def activations(recipe: ModelStageRecipe, chunks: Sequence[Chunk], pipeline_rank: int, micro_batches: int) -> Activations:
    """Of a rank that holds ``chunks`` and does ``micro_batches`` a step."""
    formula = _Formula(recipe)
    forwards = forwards_in_flight(recipe.layout.pp, len(chunks), pipeline_rank, micro_batches)
    kept = sum(count * formula.chunk(chunk) for count, chunk in zip(forwards, chunks))
    sent = sum(forwards) * formula.hidden() if recipe.layout.pp > 1 else 0.0    # a stage's output stays until its gradient is back
    return Activations(kept=round(kept + sent), working=round(max(formula.working(chunk) for chunk in chunks)))


def forwards_in_flight(stages: int, chunks: int, stage: int, micro_batches: int) -> list[int]:
    """Forward passes of each chunk of ``stage`` that wait for their backward when most do (megatron's two schedules)."""
    if chunks == 1:
        return [min(stages - stage, micro_batches)]
    before = min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, micro_batches * chunks)
    counts = [0] * chunks
    for forward in range(before):
        counts[forward // stages % chunks] += 1
    return counts
