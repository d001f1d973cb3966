"""What follows a forward pass in a training step, whosever model it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def learn(model: nn.Module, logits: Tensor, token_ids: Tensor) -> None:
    """Backward pass of a language model's loss, and an update, too small for the routes to leave the replayed ones.

    Args:
        logits: `[B, S, V]`, for each place those of the next token.
        token_ids: `[B, S]`.
    """
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=1e-6)
    model.zero_grad()
