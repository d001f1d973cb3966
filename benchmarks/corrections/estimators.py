"""The corrections: each makes a loss of a rollout, by the functions that a trainer would call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.corrections.policies import LENGTH, PROMPTS
from benchmarks.corrections.rollouts import Rollout
from router_replay import mismatch
from router_replay.mismatch import LogRatios, SamplerTopK

Loss = Callable[[Tensor], Tensor]
"""A function of the log-probabilities of all next tokens under the policy that is updated, `[L, B, T, V]`.

Its gradient is, lane by lane, that of minus the mean over prompts of an estimate of the expected reward.
"""


@dataclass(frozen=True)
class Correction:
    """One way to make a loss of a rollout that another policy sampled.

    Attributes:
        loss: of a rollout; what does not change from update to update is computed once.
        like: where what a response counts hangs on the others to its prompt, a similar correction of which that is not
            so: the expectation of that one is a sum over all responses, and only the difference has to be sampled.
    """

    loss: Callable[[Rollout], Loss]
    like: str | None = None


def grpo(rollout: Rollout, weights: Tensor | None, advantages: Tensor | None = None) -> Loss:
    """GRPO's, clipped at 0.2, with weights `[L * B, T]`, and advantages `[L * B]` or `[L * B, T]`."""
    counted = _counted(rollout, rollout.advantages if advantages is None else advantages)

    def loss(current: Tensor) -> Tensor:
        found, _ = mismatch.grpo_loss(
            current=rollout.of_sampled(current),
            old=rollout.ratios.trainer,
            advantages=counted,
            responses=rollout.responses,
            weights=weights,
            denominator=1 / LENGTH,
        )
        return found

    return loss


def centred(rollout: Rollout, weigh: Callable[[Tensor], Tensor] | None = None) -> Loss:
    """GRPO's with score centering, the sampler's distribution known whole, and weights by their rule."""
    tokens, vocabulary = rollout.rollout.flatten(0, 1), rollout.rollout.shape[-1]
    top_k = SamplerTopK.of(
        token_ids=torch.arange(vocabulary).expand_as(tokens),
        logprobs=tokens,
        responses=rollout.responses,
        vocab_size=vocabulary,
    )
    weights = None if weigh is None else weigh(rollout.ratios.token)
    of_samples, counted = grpo(rollout, weights), _counted(rollout, rollout.advantages)

    def loss(current: Tensor) -> Tensor:
        drift = mismatch.score_centering_loss(
            top_k,
            current=current.flatten(0, 1),
            advantages=counted,
            responses=rollout.responses,
            old=rollout.trainer.flatten(0, 1),
            weigh=weigh,
            denominator=1 / LENGTH,
        )
        return of_samples(current) + drift

    return loss


def gspo_to_rollout(rollout: Rollout) -> Loss:
    """GSPO's with the sampler as the old policy: one ratio of a sequence for the mismatch and for the updates."""
    counted = _counted(rollout, rollout.advantages)

    def loss(current: Tensor) -> Tensor:
        found, _ = mismatch.gspo_loss(
            current=rollout.of_sampled(current),
            old=rollout.ratios.rollout,
            advantages=counted,
            responses=rollout.responses,
            clip_low=0.1,
            clip_high=0.1,
            denominator=1 / LENGTH,
        )
        return found

    return loss


def _counted(rollout: Rollout, advantages: Tensor) -> Tensor:
    """Advantages times what their responses count.

    Losses are means over a response's tokens, and divided by 1 / T they are the sums that scores are.
    """
    shares = rollout.shares.flatten() / PROMPTS
    return advantages * (shares if advantages.dim() == 1 else shares[:, None])


def _weighted(weigh: Callable[[LogRatios], Tensor]) -> Correction:
    return Correction(lambda rollout: grpo(rollout, weigh(rollout.ratios)))


def _chain(rollout: Rollout) -> Loss:
    return grpo(rollout, mismatch.metropolis_chain(rollout.ratios, uniforms=rollout.uniforms.flatten()).multiplicity)


def _optimal_baseline(rollout: Rollout) -> Loss:
    weights = mismatch.truncated_importance_weights(rollout.ratios)
    advantages = mismatch.optimal_token_baseline_advantages(
        rollout.rewards.flatten(),
        rollout.ratios.trainer,
        rollout.trainer.exp().square().sum(-1).flatten(0, 1),
        rollout.responses,
        weights=weights,
    )
    return grpo(rollout, weights, advantages)


def _doubly_robust(rollout: Rollout) -> Loss:
    weights = mismatch.truncated_importance_weights(rollout.ratios)
    found = mismatch.doubly_robust_advantages(rollout.rewards.flatten(), rollout.values, weights, rollout.responses)
    return grpo(rollout, weights, found.advantages)


CORRECTIONS = {
    "none": Correction(lambda rollout: grpo(rollout, None)),
    "token TIS, 2": _weighted(mismatch.truncated_importance_weights),
    "IcePop, 0.5 to 5": _weighted(mismatch.icepop_weights),
    "token MIS, 0.5 to 2": _weighted(mismatch.masked_importance_weights),
    "geometric MIS, 0.9 to 1.1": _weighted(
        lambda ratios: mismatch.masked_importance_weights(ratios, level="geometric", lower=0.9, upper=1.1)
    ),
    "trust region mask, 0.1, 0.01": _weighted(lambda ratios: mismatch.trust_region_mask(ratios).double()),
    "GSPO to the rollout, 0.1": Correction(gspo_to_rollout),
    "sequence IS": _weighted(
        lambda ratios: mismatch.truncated_importance_weights(ratios, level="sequence", cap=math.inf)
    ),
    "sequence TIS, 2": _weighted(lambda ratios: mismatch.truncated_importance_weights(ratios, level="sequence")),
    "sequence MIS, 0.5 to 2": _weighted(lambda ratios: mismatch.masked_importance_weights(ratios, level="sequence")),
    "sequence SNIS, group": Correction(
        lambda rollout: grpo(rollout, mismatch.self_normalized_weights(rollout.ratios)), like="sequence TIS, 2"
    ),
    "sequence Metropolis": Correction(_chain, like="sequence TIS, 2"),
    "score centering": Correction(centred),
    "token TIS, score centering": Correction(lambda rollout: centred(rollout, mismatch.truncated_weight)),
    "token TIS, optimal baseline": Correction(_optimal_baseline, like="token TIS, 2"),
    "token TIS, doubly robust": Correction(_doubly_robust),
}
"""By name; the bounds of geometric means, GSPO's among them, are for responses of `LENGTH` tokens."""
