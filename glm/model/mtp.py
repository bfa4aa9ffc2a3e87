"""megatron's MTP layer for inputs that are already shifted."""

from megatron.core import tensor_parallel
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.utils import make_viewless_tensor


class ShiftedMTPLayer(MultiTokenPredictionLayer):
    """Takes in ``input_ids`` the token after each one.

    Upstream shifts them itself (multi_token_prediction.py:127), document by document and with messages between
    context-parallel ranks; the batch knows them already.
    """

    def _get_embeddings(self, input_ids, position_ids, embedding, hidden_states, packed_seq_params=None):
        embedded = embedding(input_ids=input_ids, position_ids=position_ids)
        return input_ids, position_ids, embedded, make_viewless_tensor(hidden_states, requires_grad=True, keep_graph=True)

    def _checkpointed_forward(self, forward_func, *, hidden_states, decoder_input, **rest):
        """Upstream hands ``rest`` to autograd too, which takes tensors only: documents are none."""
        def forward(hidden, embedded):
            return forward_func(hidden_states=hidden, decoder_input=embedded, **rest)

        return tensor_parallel.checkpoint(forward, self.config.distribute_saved_activations, hidden_states, decoder_input)
