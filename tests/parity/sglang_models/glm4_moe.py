"""GLM-4.5 as SGLang has it, and its draft, which writes down what it takes and what it gives."""

import itertools
import os
from pathlib import Path

import torch
from sglang.srt.models.glm4_moe import Glm4MoeForCausalLM
from sglang.srt.models.glm4_moe_nextn import Glm4MoeForCausalLMNextN as Draft

RECORDS = "GLM_TEST_DRAFT_RECORDS"
"""Environment: the folder for one file a forward pass."""


class Glm4MoeForCausalLMNextN(Draft):
    """Not one number differs from its base class."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.numbers = itertools.count()
        self.hidden: list[torch.Tensor] = []
        self.model.register_forward_hook(lambda module, inputs, output: self.hidden.append(output))

    @torch.no_grad()
    def forward(self, input_ids, positions, forward_batch):
        self.hidden.clear()
        out = super().forward(input_ids, positions, forward_batch)
        record = {
            "mode": forward_batch.forward_mode.name, "token_ids": input_ids, "positions": positions, "hidden": self.hidden[0],
            "logits": out.next_token_logits,
        }
        folder, number = Path(os.environ[RECORDS]), next(self.numbers)
        torch.save({name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in record.items()},
                   folder / f"{number:06d}.tmp")
        (folder / f"{number:06d}.tmp").rename(folder / f"{number:06d}.pt")
        return out


EntryClass = [Glm4MoeForCausalLM, Glm4MoeForCausalLMNextN]
