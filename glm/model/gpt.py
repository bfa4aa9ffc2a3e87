"""GPTModel with a head that also serves evaluation and reinforcement learning.

Upstream's ``_postprocess`` (gpt_model.py:560) cannot return logits when the model has MTP layers (it clones absent
labels), cannot cut the MTP gradient from the trunk, and divides the logged MTP loss per rank. This one can, and is the
only method replaced.

Legend: S sequence, B batch, H hidden, V vocabulary.
"""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, roll_tensor


class Glm45Model(GPTModel):
    """megatron-core's GPTModel in the GLM-4.5 shape, with one optional MTP layer."""

    mtp_weight: float = 0.0
    """Factor on the MTP loss in this step; 0 skips the MTP layer."""
    mtp_detached: bool = False
    """True: the MTP loss reaches the MTP layer only, not the trunk, the embedding or the head."""
    temperature: float = 1.0
    """Logits are divided by it before the loss, so that -loss is the logprob of a sample drawn at this temperature."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._mtp_loss: list[torch.Tensor] = []

    def take_mtp_loss(self) -> torch.Tensor:
        """float32 [2]: sum of the unweighted MTP losses since the last call and how many tokens, of this rank."""
        taken, self._mtp_loss = self._mtp_loss, []
        if not taken:
            return torch.zeros(2, device=next(self.parameters()).device)
        return torch.stack(taken).sum(0)

    def _postprocess(
        self, hidden_states, input_ids, position_ids, labels, rotary_pos_emb, rotary_pos_cos, rotary_pos_sin,
        mtp_in_postprocess=None, loss_mask=None, attention_mask=None, packed_seq_params=None, **unused,
    ):
        """Losses [B, S] of each token when ``labels`` are given, else logits [B, S, V]."""
        if not self.post_process:
            return hidden_states
        if labels is not None and self.mtp_weight and self.mtp_process:
            mtp_hidden = self._mtp_hidden(
                hidden_states, input_ids, position_ids, attention_mask, rotary_pos_emb, rotary_pos_cos, rotary_pos_sin,
                packed_seq_params,
            )
            hidden_states = self._with_mtp_loss(hidden_states, mtp_hidden, labels, loss_mask, packed_seq_params)
        logits_SBV, _ = self.output_layer(hidden_states, runtime_gather_output=True if labels is None else None)
        if labels is None:
            return logits_SBV.transpose(0, 1).contiguous()
        if self.temperature != 1.0:
            logits_SBV = logits_SBV / self.temperature
        return self.compute_language_model_loss(labels, logits_SBV)

    def _mtp_hidden(
        self, hidden_SBH, input_ids, position_ids, attention_mask, rotary, rotary_cos, rotary_sin, packed_seq_params,
    ) -> torch.Tensor:
        """Output of the MTP layer, [S, B, H]."""
        embedding = self.embedding
        if self.mtp_detached:
            hidden_SBH = hidden_SBH.detach()
            embedding = lambda **inputs: self.embedding(**inputs).detach()  # noqa: E731
        both = self.mtp(
            input_ids=input_ids, position_ids=position_ids, hidden_states=hidden_SBH, attention_mask=attention_mask,
            rotary_pos_emb=rotary, rotary_pos_cos=rotary_cos, rotary_pos_sin=rotary_sin,
            packed_seq_params=packed_seq_params, embedding=embedding,
        )
        return both.chunk(2, dim=0)[1]  # megatron's MTP block returns [trunk; MTP] along the sequence

    def _with_mtp_loss(self, hidden_SBH, mtp_hidden_SBH, labels_BS, loss_mask_BS, packed_seq_params) -> torch.Tensor:
        """``hidden_SBH`` unchanged in value; its backward also carries the weighted MTP loss.

        The MTP layer at position t predicts the label of t + 1, inside its document.
        """
        weight = self.output_layer.weight
        logits_SBV, _ = self.output_layer(mtp_hidden_SBH, weight=weight.detach() if self.mtp_detached else weight)
        roll = dict(shifts=-1, dims=-1, cp_group=self.cp_group, packed_seq_params=packed_seq_params)
        labels_BS, _ = roll_tensor(labels_BS.clone(), **roll)
        mask_BS = torch.ones_like(labels_BS, dtype=torch.float32) if loss_mask_BS is None else loss_mask_BS
        mask_BS, tokens = roll_tensor(mask_BS.clone(), **roll)
        losses_BS = mask_BS * self.compute_language_model_loss(labels_BS, logits_SBV)
        self._mtp_loss.append(torch.stack([losses_BS.detach().sum(), tokens.detach().float()]))
        return MTPLossAutoScaler.apply(hidden_SBH, self.mtp_weight * losses_BS)
