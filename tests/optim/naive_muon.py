"""Muon once more, naively: one matrix after the other, by singular values, in float64. Shares no code with glm.optim."""

import torch

POLYNOMIALS = {
    "simple": [(3.4445, -4.7750, 2.0315)] * 5,
    "quintic": [
        (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
    ],
    "polar_express": [
        (8.2051, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184), (3.9096, -2.8234, 0.5250), (3.2856, -2.4153, 0.4853), (2.2779, -1.6198, 0.3985),
    ],
}


def orthogonalised(matrix: torch.Tensor, polynomials: list[tuple[float, float, float]]) -> torch.Tensor:
    """The polynomials on the singular values of an exact decomposition."""
    u, s, vt = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    for a, b, c in polynomials:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt


def row_sets(name: str, rows: int, queries: int, head_dim: int, qkv: str, gate_up: str) -> list[list[int]]:
    """Which rows of a stored matrix make up each matrix that is orthogonalised.

    A qkv matrix has for each group ``queries`` rows of query heads, then one key head, then one value head.
    """
    if name.endswith("linear_qkv.weight") and qkv != "fused":
        heads: dict[str, list[list[int]]] = {"q": [], "k": [], "v": []}
        for start in range(0, rows, queries + 2 * head_dim):
            for kind, first, last in (("q", 0, queries), ("k", queries, queries + head_dim), ("v", queries + head_dim, queries + 2 * head_dim)):
                heads[kind] += [list(range(start + row, start + row + head_dim)) for row in range(first, last, head_dim)]
        if qkv == "per_head":
            return [rows for kind in heads.values() for rows in kind]
        return [[row for head in kind for row in head] for kind in heads.values()]
    if ("linear_fc1" in name or "weight1" in name) and gate_up == "separate":
        return [list(range(rows // 2)), list(range(rows // 2, rows))]
    return [list(range(rows))]


def last_update(name: str, gradients: list[torch.Tensor], *, queries: int, head_dim: int, qkv: str = "separate", gate_up: str = "separate",
                coefficients: str = "simple", momentum: float = 0.95, update_rms: float = 0.2) -> torch.Tensor:
    """The update of the last of ``gradients`` (Nesterov), float64, to be multiplied by the learning rate and subtracted."""
    buffer = torch.zeros_like(gradients[0], dtype=torch.float64)
    for gradient in gradients:
        buffer = momentum * buffer + (1 - momentum) * gradient.double()
    direction = (1 - momentum) * gradients[-1].double() + momentum * buffer
    update = torch.zeros_like(direction)
    for matrix, result in zip(direction, update) if direction.dim() == 3 else [(direction, update)]:
        for rows in row_sets(name, len(matrix), queries, head_dim, qkv, gate_up):
            part = matrix[rows]
            result[rows] = update_rms * max(part.shape) ** 0.5 * orthogonalised(part, POLYNOMIALS[coefficients])
    return update
