"""GLM-4.5 and its MTP layer."""

from sglang.srt.models.glm4_moe import Glm4MoeForCausalLM
from sglang.srt.models.glm4_moe_nextn import Glm4MoeForCausalLMNextN

EntryClass = [Glm4MoeForCausalLM, Glm4MoeForCausalLMNextN]
