"""The shapes on which the suite's model is compared with others' programs.

``QUICK`` has every odd choice at least once; ``grid`` combines them. Vocabularies are prime: no tensor-parallel size divides
them. ``max_position`` is the longest row of any test.
"""

from itertools import product

from glm.recipe.sections import Model
from tests.model_fixture import SHAPES, tiny_shape

VARIANTS = {
    "355b": {"qk_norm": True, "routed_scaling_factor": 2.5},
    "air": {"qk_norm": False, "routed_scaling_factor": 1.0},
}
HEADS = {
    # 6 heads of 24 are 144, hidden_size is 48: head_dim is not hidden_size / heads
    1: {"num_attention_heads": 6, "num_query_groups": 1, "head_dim": 24, "hidden_size": 48},
    # 6 heads of 16 are 96, hidden_size is 64
    3: {"num_attention_heads": 6, "num_query_groups": 3, "head_dim": 16},
    # every query head has its own keys and values
    4: {"num_attention_heads": 4, "num_query_groups": 4, "head_dim": 20, "hidden_size": 56},
}

QUICK: dict[str, Model] = SHAPES | {
    "1 key/value head, 2 dense layers": tiny_shape(**VARIANTS["355b"], **HEADS[1], num_dense_layers=2, vocab_size=331),
    "3 key/value heads, all but one dense": tiny_shape(**VARIANTS["air"], **HEADS[3], num_dense_layers=3, vocab_size=311),
    "as many key/value heads as heads": tiny_shape(**VARIANTS["355b"], **HEADS[4], vocab_size=307),
    "no dense layer": tiny_shape(**VARIANTS["air"], num_dense_layers=0),
    "1 expert a token, 355b": tiny_shape(**VARIANTS["355b"], experts_per_token=1),
    "1 expert a token, air": tiny_shape(**VARIANTS["air"], experts_per_token=1),
    "all experts, 355b": tiny_shape(**VARIANTS["355b"], experts_per_token=8),
    "all but one expert, air": tiny_shape(**VARIANTS["air"], num_experts=7, experts_per_token=6),
    "no shared expert": tiny_shape(**VARIANTS["355b"], num_shared_experts=0),
    "all of head_dim rotated": tiny_shape(**VARIANTS["355b"], rotary_percent=1.0),
}


def grid() -> dict[str, Model]:
    """Every variant with every number of key/value heads, of dense layers and of experts a token."""
    return {
        f"{variant}, {heads} key/value heads, {dense} dense, {chosen} of 7 experts":
            tiny_shape(**VARIANTS[variant], **HEADS[heads], num_dense_layers=dense, num_experts=7, experts_per_token=chosen,
                       vocab_size=313)
        for variant, heads, dense, chosen in product(VARIANTS, HEADS, (0, 1, 2, 3), (1, 2, 4, 6, 7))
    }
