"""From a TransformerConfig to the model chunks of this rank."""

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

from glm.model.dispatch import use_local_dispatch
from glm.model.gpt import Glm45Model
from glm.model.layers import decoder_spec, mtp_spec
from glm.model.shards import mark_shards
from glm.model.vocabulary import padded_size
from glm.platform import active
from glm.recipe.sections import Model


def build_chunks(
    config: TransformerConfig, model: Model, *, rotary_base: int, device: torch.device | None = None, attention: str = "sdpa",
) -> list[Glm45Model]:
    """The parts of the network of ``model`` that this rank holds: one, or ``layout.vpp`` of them. Weights are not initialised.

    ``device``: this rank's by default; ``meta`` allocates nothing. ``attention``: the recipe's kernels.attention.
    """
    device = device or active().device
    count = config.virtual_pipeline_model_parallel_size
    with device:
        chunks = [_chunk(config, model, rotary_base, attention, stage).to(device) for stage in ([None] if count is None else range(count))]
    for chunk in chunks:
        mark_shards(chunk, model.vocab_size)
    return chunks


def _chunk(config: TransformerConfig, model: Model, rotary_base: int, attention: str, vp_stage: int | None) -> Glm45Model:
    built = Glm45Model(
        config,
        decoder_spec(config, attention, vp_stage),
        vocab_size=padded_size(model.vocab_size, config.tensor_model_parallel_size),
        tokens=model.vocab_size,
        max_sequence_length=model.max_position,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        rotary_percent=model.rotary_percent,
        rotary_base=rotary_base,
        share_embeddings_and_output_weights=False,
        mtp_block_spec=mtp_spec(config, attention, vp_stage),
        vp_stage=vp_stage,
    )
    use_local_dispatch(built)
    return built
