"""How far the trainer's probabilities of the sampled tokens are from those of the rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """Estimates of KL(rollout || trainer) per token, in nats, and tails of the probability ratio.

    Attributes:
        num_tokens: tokens that were counted.
        k1: mean of -log r, r = p_trainer / p_rollout: unbiased, noisy, may be negative.
        k3: mean of r - 1 - log r: unbiased, never negative, less noisy (John Schulman, "Approximating KL Divergence",
            2020, http://joschu.net/blog/kl-approx.html).
        ratio_tails: F(tau) by tau: the share of tokens with max(r, 1/r) > tau (arXiv 2510.11370).
    """

    num_tokens: int
    k1: float
    k3: float
    ratio_tails: dict[float, float]


def divergence(
    logprobs_trainer: Tensor, logprobs_rollout: Tensor, mask: Tensor, thresholds: Sequence[float] = (2.0,)
) -> Divergence:
    """Compare the log-probabilities of tokens that the rollout sampled.

    Args:
        logprobs_trainer, logprobs_rollout: float ``[...]``, natural logarithms, of one shape.
        mask: bool of that shape, True for sampled tokens; prompt and padding do not count.
        thresholds: values of tau above 1.

    Raises:
        ValueError: shapes differ, no token counts, or a threshold is not above 1.
    """
    if not logprobs_trainer.shape == logprobs_rollout.shape == mask.shape:
        raise ValueError(
            f"trainer log-probs {list(logprobs_trainer.shape)}, rollout log-probs {list(logprobs_rollout.shape)} and "
            f"mask {list(mask.shape)} must have one shape"
        )
    if min(thresholds, default=2.0) <= 1:
        raise ValueError(f"thresholds must be above 1, got {list(thresholds)}: max(r, 1/r) is never below 1")
    if not mask.any():
        raise ValueError("the mask counts no token: nothing was sampled, or the mask is inverted")
    log_ratio = (logprobs_trainer[mask].double() - logprobs_rollout[mask].double()).detach()
    return Divergence(
        num_tokens=log_ratio.numel(),
        k1=float(-log_ratio.mean()),
        k3=float((torch.expm1(log_ratio) - log_ratio).mean()),
        ratio_tails={
            tau: float((log_ratio.abs() > torch.tensor(tau, dtype=torch.float64).log()).double().mean())
            for tau in thresholds
        },
    )
