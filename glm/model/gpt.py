"""GPTModel with a head that also serves evaluation and reinforcement learning.

Upstream's ``_postprocess`` (gpt_model.py:560) cannot return logits when the model has MTP layers (it clones absent
labels), cannot cut the MTP gradient from the trunk, and divides the logged MTP loss per rank. Its rotation counts places of
a row, not of a document, and under context parallelism wants every document cut separately. Both are replaced; a checkpoint
leaves out the padding of the vocabulary.

Legend: S sequence (of this rank), B batch, H hidden, V vocabulary (of this rank), D head dimension.
"""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

from glm.model.documents import Documents, next_in_document
from glm.model.head import label_is_largest, token_losses_and_hits
from glm.model.vocabulary import TABLES, unpadded_table, without_padding


class Glm45Model(GPTModel):
    """megatron-core's GPTModel in the GLM-4.5 shape, with one optional MTP layer. One chunk of it under pipeline parallelism."""

    mtp_weight: float = 0.0
    """Factor on the MTP loss in this step; 0 skips the MTP layer."""
    mtp_detached: bool = False
    """True: the MTP loss reaches the MTP layer only, not the trunk, the embedding or the head."""
    temperature: float = 1.0
    """Logits are divided by it before the loss, so that -loss is the logprob of a sample drawn at this temperature."""

    def __init__(self, *args, tokens: int, rotary_base: int, rotary_percent: float, **kwargs):
        """``tokens``: entries of the vocabulary; ``vocab_size`` counts the padding of tensor parallelism too."""
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.tokens = tokens
        self._rotated = int(self.config.kv_channels * rotary_percent)
        self._rotary_base = rotary_base
        self._mtp_loss: list[torch.Tensor] = []

    def setup_embeddings_and_output_layer(self) -> None:
        """Marks the MTP layer's copy of the embedding, on a stage that does not have the original.

        Upstream also sends the original over (language_module.py:244). Here both are drawn, or loaded, under one name; their
        gradients are summed by finalize_model_grads.
        """
        if self.mtp_process and not self.pre_process:
            self.embedding.word_embeddings.weight.shared_embedding = True

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Upstream's, embedding and head without the rows that no token has."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.tokens < self.vocab_size:
            state |= {prefix + name: unpadded_table(state[prefix + name], self.tokens) for name in TABLES if prefix + name in state}
        return state

    def take_mtp_loss(self) -> torch.Tensor:
        """float32 [4], since the last call, of this rank: sum of the unweighted MTP losses, how many tokens, how many of them were
        the MTP layer's first choice, and the sum of the probabilities it gave them."""
        taken, self._mtp_loss = self._mtp_loss, []
        if not taken:
            return torch.zeros(4, device=next(self.parameters()).device)
        return torch.stack(taken).sum(0)

    def _preprocess(self, input_ids, position_ids, *args, **kwargs):
        """Upstream's, with the rotation of the positions given: float32 [S, 1, 1, rotated dimensions]."""
        decoder_input, _, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        return decoder_input, self._angles(position_ids[0]), *rest

    def _angles(self, positions_S: torch.Tensor) -> torch.Tensor:
        """position x base^(-2i / rotated) for i < rotated / 2, twice over: dimension i turns with i + rotated / 2."""
        exponents = torch.arange(0, self._rotated, 2, dtype=torch.float32, device=positions_S.device) / self._rotated
        angles = torch.outer(positions_S.float(), 1.0 / self._rotary_base**exponents)
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]

    def _postprocess(
        self, hidden_states, input_ids, position_ids, labels, rotary_pos_emb, rotary_pos_cos, rotary_pos_sin,
        mtp_in_postprocess=None, loss_mask=None, attention_mask=None, packed_seq_params: Documents | None = None, **unused,
    ):
        """Losses [B, S] of each token when ``labels`` are given, else logits [B, S, whole vocabulary]."""
        if not self.post_process:
            return hidden_states
        if labels is not None and self.mtp_weight and self.mtp_process:
            documents = packed_seq_params or _plain_rows(input_ids, labels, loss_mask)
            mtp_hidden = self._mtp_hidden(hidden_states, documents, attention_mask, rotary_pos_emb, packed_seq_params)
            hidden_states = self._with_mtp_loss(hidden_states, mtp_hidden, documents)
        if labels is None:
            logits_SBV, _ = self.output_layer(hidden_states, runtime_gather_output=True)
            return logits_SBV[..., :self.tokens].transpose(0, 1).contiguous()
        return self._losses_and_hits(hidden_states, self.output_layer.weight, labels, self.temperature)[0]

    def _losses_and_hits(self, hidden_SBH, weight, labels_BS, temperature: float, with_hits: bool = False):
        """float32 [B, S], and bool [B, S]: where the label is the first choice (None under tensor parallelism unless asked for)."""
        if self.config.tensor_model_parallel_size == 1:
            return token_losses_and_hits(hidden_SBH.transpose(0, 1), weight, labels_BS, temperature)
        logits_SBV, _ = self.output_layer(hidden_SBH, weight=weight)
        logits_SBV = without_padding(logits_SBV, self.tokens)
        hits_BS = label_is_largest(logits_SBV, labels_BS, self.pg_collection.tp) if with_hits else None
        losses_BS = self.compute_language_model_loss(labels_BS, logits_SBV if temperature == 1.0 else logits_SBV / temperature)
        return losses_BS, hits_BS

    def _mtp_hidden(self, hidden_SBH, documents: Documents, attention_mask, rotation, packed_seq_params) -> torch.Tensor:
        """Output of the MTP layer, [S, B, H]."""
        embedding = self.embedding
        if self.mtp_detached:
            hidden_SBH = hidden_SBH.detach()
            embedding = lambda **inputs: self.embedding(**inputs).detach()  # noqa: E731
        both = self.mtp(
            input_ids=documents.mtp_token_ids, position_ids=None, hidden_states=hidden_SBH, attention_mask=attention_mask,
            rotary_pos_emb=rotation, packed_seq_params=packed_seq_params, embedding=embedding,
        )
        return both.chunk(2, dim=0)[1]  # megatron's MTP block returns [trunk; MTP] along the sequence

    def _with_mtp_loss(self, hidden_SBH, mtp_hidden_SBH, documents: Documents) -> torch.Tensor:
        """``hidden_SBH`` unchanged in value; its backward also carries the weighted MTP loss.

        The MTP layer at position t predicts the label of t + 1, inside its document.
        """
        weight = self.output_layer.weight
        weight = weight.detach() if self.mtp_detached else weight
        mask_BS = documents.mtp_mask
        losses_BS, hits_BS = self._losses_and_hits(mtp_hidden_SBH, weight, documents.mtp_labels, temperature=1.0, with_hits=True)
        losses_BS = mask_BS * losses_BS
        lost = losses_BS.detach()
        self._mtp_loss.append(torch.stack([
            lost.sum(), mask_BS.sum(), (mask_BS * hits_BS).sum(), (mask_BS * (-lost).exp()).sum(),
        ]))
        return MTPLossAutoScaler.apply(hidden_SBH, self.mtp_weight * losses_BS)


def _plain_rows(input_ids: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor | None) -> Documents:
    """What the MTP layer needs of rows that are one document each."""
    lengths = [input_ids.shape[1]]
    mask = torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask
    return Documents(
        lengths=lengths, mtp_token_ids=next_in_document(input_ids, lengths), mtp_labels=next_in_document(labels, lengths),
        mtp_mask=next_in_document(mask, lengths),
    )
