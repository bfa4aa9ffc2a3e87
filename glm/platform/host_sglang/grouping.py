"""Which requests of a batch are padded into one attention call. Pure; imports nothing."""

BUCKET = 64
"""Keys are rounded up to this in batch-invariant mode."""


def group_requests(queries: list[int], keys: list[int], invariant: bool) -> list[tuple[int, int, list[int]]]:
    """[(padded queries, padded keys, members)], every request in exactly one group.

    By default all requests share one call, unless padding would more than double the query rows (a long prompt beside
    short ones); then requests with equally many queries share one. With ``invariant`` the padding of a request depends
    on that request alone, so its result does not depend, bit for bit, on who is in the batch beside it.
    """
    if invariant:
        return [
            (size, padded, members)
            for (size, padded), members in _by((q, -(-k // BUCKET) * BUCKET) for q, k in zip(queries, keys)).items()
        ]
    if max(queries) * len(queries) <= 2 * sum(queries) + BUCKET:
        return [(max(queries), max(keys), list(range(len(queries))))]
    return [(size, max(keys[i] for i in members), members) for size, members in _by(queries).items()]


def _by(labels) -> dict:
    groups: dict = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    return groups
