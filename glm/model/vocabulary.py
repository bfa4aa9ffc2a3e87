"""A vocabulary that tensor parallelism does not divide: embedding and head get rows that no token has.

They are zero and stay so: their logits never count, their gradients are zero. Checkpoints and exports do not have them, so
both are the same under every layout.
"""

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")


def padded_size(vocab_size: int, tp: int) -> int:
    """Rows of embedding and head over all tensor-parallel ranks."""
    return -(-vocab_size // tp) * tp


def real_rows(vocab_size: int, rows: int) -> int:
    """How many of this rank's ``rows`` some token has."""
    return min(max(vocab_size - parallel_state.get_tensor_model_parallel_rank() * rows, 0), rows)


def without_padding(logits_SBV: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """This rank's logits, those of no token as small as the type goes; changed in place."""
    rows = logits_SBV.shape[-1]
    real = real_rows(vocab_size, rows)
    if real < rows:
        logits_SBV[..., real:] = torch.finfo(logits_SBV.dtype).min
    return logits_SBV


def unpadded_table(table: ShardedTensor, vocab_size: int) -> ShardedTensorFactory:
    """``table`` of this rank as it lies in a checkpoint: the rows of tokens only, the last rank's part shorter."""
    rows, width = table.local_shape
    real = real_rows(vocab_size, rows)
    first = parallel_state.get_tensor_model_parallel_rank() * rows

    def build(key, data, replica_id, flattened_range):
        if not real:
            return []
        return [ShardedTensor(
            key, data[:real], data.dtype, (real, width), (vocab_size, width), (first, 0), None, replica_id=replica_id,
        )]

    def merge(parts):
        return torch.cat([*parts, table.data.new_zeros(rows - real, width, dtype=parts[0].dtype if parts else None)])

    return ShardedTensorFactory(table.key, table.data, build, merge, table.replica_id)
