"""What transformers makes of a Hugging Face folder: code we did not write, to compare with."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from glm.errors import CheckpointError


class Reference:
    """``Glm4MoeForCausalLM`` and, if the folder has an MTP layer, transformers' ``MtpModel``, in float32 on the CPU."""

    def __init__(self, folder: Path):
        from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
        from transformers.modeling_layers import MtpModel
        from transformers.utils import logging

        config = Glm4MoeConfig.from_pretrained(folder, local_files_only=True)
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()  # it warns of the MTP layer's weights, which the main model does not use
        logging.disable_progress_bar()
        try:
            self.model, told = Glm4MoeForCausalLM.from_pretrained(
                folder, config=config, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True,
                local_files_only=True,
            )
            self._refuse_gaps(folder, told, config.num_hidden_layers)
            self.mtp = None
            if config.num_mtp_layers:
                # transformers knows the MTP layer by the number it has in the released models
                self.model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{config.num_hidden_layers}\."]
                self.mtp = MtpModel.from_pretrained(self.model).eval()
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
        self.model.eval()

    def logits(self, token_ids_BS: Tensor) -> Tensor:
        """[B, S, V]."""
        return self.model(input_ids=token_ids_BS, use_cache=False).logits

    def mtp_losses(self, token_ids_BS: Tensor) -> Tensor:
        """[B, S - 2]: at position t the loss of predicting token t + 2 from the trunk at t and the embedding of t + 1."""
        hidden_BSH = self.model.model(input_ids=token_ids_BS, use_cache=False).last_hidden_state
        embedded_BSH = self.mtp.embed_tokens(token_ids_BS[:, 1:])
        S = embedded_BSH.shape[1]
        positions_BS = torch.arange(S)[None]
        causal = torch.full((S, S), float("-inf")).triu(1)[None, None]
        out_BSH = self.mtp.layers[0](
            embedded_BSH, hidden_BSH[:, :-1], position_embeddings=self.mtp.rotary_emb(embedded_BSH, positions_BS),
            attention_mask=causal, position_ids=positions_BS, past_key_values=None,
        )
        logits_BSV = self.mtp.shared_head(out_BSH)[:, :-1]
        return F.cross_entropy(logits_BSV.transpose(1, 2), token_ids_BS[:, 2:], reduction="none")

    def _refuse_gaps(self, folder: Path, told: dict, num_layers: int) -> None:
        odd = [name for name in told["unexpected_keys"] if not re.match(rf"model\.layers\.{num_layers}\.", name)]
        gaps = {"missing": told["missing_keys"], "unexpected": odd, "of another shape": told["mismatched_keys"]}
        found = "; ".join(f"{what}: {sorted(map(str, names))[:5]}" for what, names in gaps.items() if names)
        if found:
            raise CheckpointError(str(folder), found, "a folder that transformers loads completely", "export again")
