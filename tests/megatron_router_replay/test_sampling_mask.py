"""Sampling masks in the cross entropy that Megatron's trainers take log-probabilities from."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from router_replay.mismatch import apply_sampling_mask, kept_token_ids


def test_vocabulary_parallel_cross_entropy_is_that_of_the_truncated_distribution():
    torch.manual_seed(0)
    logits = torch.randn(4, 2, 12, requires_grad=True)
    kept = kept_token_ids(logits, top_p=0.6)
    sampled = kept[..., 0]
    losses = vocab_parallel_cross_entropy(apply_sampling_mask(logits, kept, sampled), sampled)
    losses.sum().backward()
    for place in torch.cartesian_prod(torch.arange(4), torch.arange(2)).tolist():
        row, ids = logits.detach()[tuple(place)], kept[tuple(place)]
        ids = ids[ids >= 0]
        probs = row[ids].softmax(0)
        torch.testing.assert_close(losses[tuple(place)], -probs[0].log())
        gradient = torch.zeros(12)
        gradient[ids] = probs
        gradient[ids[0]] -= 1
        torch.testing.assert_close(logits.grad[tuple(place)], gradient)
