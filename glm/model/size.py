"""How large a model is, and what a token costs: parameters, floating-point operations, key/value bytes. Imports no torch.

Counts are of unique tensors: the MTP layer shares embedding and output head with the trunk. The router's balancing bias
is a buffer, counted apart.
"""

from dataclasses import dataclass

from glm.recipe.sections import Model


@dataclass(frozen=True)
class Blocks:
    """Parameters of each kind of block."""

    attention: int
    """Matrices, biases of query, key and value, and QK-norm."""
    layer_norms: int
    dense_ffn: int
    expert: int
    router: int
    embedding: int
    """The output head has as many."""
    mtp_extra: int
    """Of the MTP layer beyond a layer with experts: the projection of [embedding, hidden], and three norms."""

    @property
    def dense_layer(self) -> int:
        return self.attention + self.layer_norms + self.dense_ffn

    def expert_layer(self, experts: int) -> int:
        """A layer in which ``experts`` experts count, shared ones included."""
        return self.attention + self.layer_norms + self.router + experts * self.expert


@dataclass(frozen=True)
class Parameters:
    """Total and active (those one token uses) parameters of the parts."""

    body: int
    body_active: int
    final_norm: int
    mtp: int
    mtp_active: int
    embedding: int
    head: int
    router_bias: int
    """Entries of the balancing biases, fp32, one an expert and router; in no total."""

    @property
    def total(self) -> int:
        """Everything that is trained, each tensor once."""
        return self.total_without_mtp + self.mtp

    @property
    def total_without_mtp(self) -> int:
        return self.body + self.final_norm + self.embedding + self.head

    @property
    def active(self) -> int:
        return self.body_active + self.final_norm + self.mtp_active + self.embedding + self.head

    def conventions(self) -> dict[str, tuple[int, int]]:
        """Name of a way to count -> (total, active). The advertised 355B / 32B is ``body and MTP``, Air's 106B / 12B ``body``.

        The last row is what files with the MTP layer's own copies of embedding and head hold (GLM-4.5's do, GLM-4.6's do not);
        a copy makes no further parameter active.
        """
        body, active = self.body + self.final_norm, self.body_active + self.final_norm
        outer = self.embedding + self.head
        copies = outer if self.mtp else 0
        return {
            "body": (body, active),
            "body and MTP": (body + self.mtp, active + self.mtp_active),
            "body, embedding and head": (self.total_without_mtp, active + outer),
            "body and head": (body + self.head, active + self.head),
            "everything": (self.total, self.active),
            "everything, and MTP's copies of embedding and head": (self.total + copies, self.active),
        }


def blocks(model: Model) -> Blocks:
    hidden, query = model.hidden_size, model.num_attention_heads * model.head_dim
    key = model.num_query_groups * model.head_dim
    return Blocks(
        attention=2 * hidden * query + 2 * hidden * key + query + 2 * key + (2 * model.head_dim if model.qk_norm else 0),
        layer_norms=2 * hidden,
        dense_ffn=3 * hidden * model.dense_ffn_size,
        expert=3 * hidden * model.expert_ffn_size,
        router=model.num_experts * hidden,
        embedding=model.vocab_size * hidden,
        mtp_extra=2 * hidden * hidden + 3 * hidden,
    )


def parameters(model: Model) -> Parameters:
    block = blocks(model)
    with_experts = model.num_layers - model.num_dense_layers
    every = block.expert_layer(model.num_experts + model.num_shared_experts)
    used = block.expert_layer(model.experts_per_token + model.num_shared_experts)
    return Parameters(
        body=model.num_dense_layers * block.dense_layer + with_experts * every,
        body_active=model.num_dense_layers * block.dense_layer + with_experts * used,
        final_norm=model.hidden_size,
        mtp=model.num_mtp_layers * (every + block.mtp_extra),
        mtp_active=model.num_mtp_layers * (used + block.mtp_extra),
        embedding=block.embedding,
        head=block.embedding,
        router_bias=(with_experts + model.num_mtp_layers) * model.num_experts,
    )


def training_flops_per_token(model: Model, sequence_length: float) -> float:
    """Floating-point operations of forward and backward, a multiply-add being two.

    6 for every active parameter a token is multiplied with (the head once more for the MTP layer, the embedding not: it is
    a look-up), and for attention scores and their sum over values 4 x head_dim x heads x (sequence_length / 2, as a
    position sees on average half of them), three times over for the backward pass. Of packed documents a token sees fewer: what
    counts is then twice the number of tokens that one of them attends to on average.
    """
    counted = parameters(model)
    heads = counted.head * (1 + model.num_mtp_layers)
    attention_layers = model.num_layers + model.num_mtp_layers
    scores = 6 * attention_layers * model.num_attention_heads * model.head_dim * sequence_length
    return 6 * (counted.body_active + counted.mtp_active + heads) + scores


def kv_bytes_per_token(model: Model, bytes_per_value: int = 2) -> int:
    """Keys and values of one position in all layers; the MTP layer, which drafts, is not counted."""
    return model.num_layers * 2 * model.num_query_groups * model.head_dim * bytes_per_value
