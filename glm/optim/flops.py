"""What Muon costs: floating-point operations of orthogonalisation. Imports no torch."""

from collections.abc import Iterator

from glm.recipe.sections import AdamWAlone, Model, Muon


def newton_schulz_flops(m: int, n: int, steps: int = 5) -> int:
    """Of one m x n matrix, a multiply-add being two: X X', its square, and their product with X, on the shorter side."""
    short, long = sorted((m, n))
    return steps * (4 * short * short * long + 2 * short**3)


def step_flops(model: Model, settings: Muon | AdamWAlone) -> int:
    """Of one optimizer step of the whole model, every matrix once; 0 under AdamW alone. What is elementwise does not count."""
    if not isinstance(settings, Muon):
        return 0
    return sum(count * newton_schulz_flops(m, n, settings.newton_schulz_steps) for count, m, n in _matrices(model, settings))


def _matrices(model: Model, settings: Muon) -> Iterator[tuple[int, int, int]]:
    """(how many, rows, columns) of the matrices that Muon orthogonalises, parts that the recipe keeps apart one by one."""
    hidden, layers = model.hidden_size, model.num_layers + model.num_mtp_layers
    with_experts = layers - model.num_dense_layers
    queries, keys = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    yield from {
        "separate": [(layers, queries, hidden), (2 * layers, keys, hidden)],
        "per_head": [(layers * (model.num_attention_heads + 2 * model.num_query_groups), model.head_dim, hidden)],
        "fused": [(layers, queries + 2 * keys, hidden)],
    }[settings.split.qkv]
    yield layers, hidden, queries
    for count, width in (
        (model.num_dense_layers, model.dense_ffn_size), (with_experts * model.num_experts, model.expert_ffn_size),
        (with_experts * (model.num_shared_experts > 0), model.num_shared_experts * model.expert_ffn_size),
    ):
        yield (2 * count, width, hidden) if settings.split.gate_up == "separate" else (count, 2 * width, hidden)
        yield count, hidden, width
    yield model.num_mtp_layers, hidden, 2 * hidden
    if settings.head == "muon":
        yield 1, model.vocab_size, hidden
    if settings.router == "muon":
        yield with_experts, model.num_experts, hidden
