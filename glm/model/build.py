"""From a TransformerConfig to a model on this rank."""

from megatron.core.transformer import TransformerConfig

from glm.model.gpt import Glm45Model
from glm.model.layers import decoder_spec, mtp_spec
from glm.platform import active
from glm.recipe.sections import Model


def build_model(config: TransformerConfig, model: Model, *, rotary_base: int) -> Glm45Model:
    """The network of ``model`` on this rank's device; weights are not initialised."""
    decoder = decoder_spec(config)
    built = Glm45Model(
        config,
        decoder,
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_position,
        position_embedding_type="rope",
        rotary_percent=model.rotary_percent,
        rotary_base=rotary_base,
        share_embeddings_and_output_weights=False,
        mtp_block_spec=mtp_spec(config, decoder),
    )
    return built.to(active().device)
