"""Long documents, sorted by length: how often a mixture reads each bucket is how they are up-sampled."""


def bucket_of(tokens: int, buckets: dict[str, int]) -> str | None:
    """The bucket with the highest number of tokens that the document reaches; None if it reaches none."""
    reached = [(least, name) for name, least in buckets.items() if tokens >= least]
    return max(reached)[1] if reached else None
