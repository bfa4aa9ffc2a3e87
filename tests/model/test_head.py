"""The head's gradient in bfloat16: rounded here and there, but not the same way for every token."""

import torch
import torch.nn.functional as F

from glm import platform

platform.activate("host")
from glm.model.head import token_losses  # noqa: E402  (imports megatron)

TOKENS, HIDDEN, VOCABULARY = 150, 64, 512


def test_one_over_the_tokens_is_not_rounded_alike_for_all():
    """1/150 in bfloat16 is 0.2 % off: as a factor of every token that would be a bias of the whole gradient, not noise."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, TOKENS, HIDDEN, generator=generator).bfloat16().requires_grad_()
    weight = (0.1 * torch.randn(VOCABULARY, HIDDEN, generator=generator)).bfloat16().requires_grad_()
    labels = torch.randint(VOCABULARY, (1, TOKENS), generator=generator)
    (token_losses(hidden, weight, labels, 1.0) / TOKENS).sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    F.cross_entropy((exact[0] @ exact[1].T)[0], labels[0]).backward()
    for found, reference in zip((hidden.grad, weight.grad), (one.grad for one in exact)):
        along = (found.double() * reference).sum() / reference.square().sum()
        assert abs(along - 1) < 5e-4, f"{along - 1:+.2%} along the exact gradient"
