"""Bias and noise of the policy gradient under each correction, beside the exact gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.corrections.estimators import CORRECTIONS, Correction
from benchmarks.corrections.policies import LENGTH, PROMPTS, Policies, expected_rewards, flat_gradients, gradients
from benchmarks.corrections.rollouts import Rollout
from benchmarks.corrections.training import GROUP_SIZE, first_policies, fixed_errors, generators

LEARNT, RATE = 20, 0.02
"""Steps along the exact gradient that a policy has behind it, and Adam's learning rate."""


@dataclass(frozen=True)
class Scenario:
    """What the sampler's weights are beside the trainer's.

    Attributes:
        error: standard deviation of the relative error of each.
        lag: steps along the exact gradient by which they are older.
    """

    name: str
    error: float = 0.0
    lag: int = 0


SCENARIOS = (
    Scenario("error 0.02", error=0.02),
    Scenario("error 0.05", error=0.05),
    Scenario("error 0.15", error=0.15),
    Scenario("error 0.3", error=0.3),
    Scenario("6 steps old", lag=6),
)


def learnt_policies(seeds: Sequence[int], steps: int) -> tuple[Policies, Tensor]:
    """Policies of each seed, a lane each, after steps along the exact gradient, and the rewards of all responses."""
    first, rewards = first_policies(seeds)
    policies = first.trainable()
    optimizer = torch.optim.Adam(policies.tensors, lr=RATE, betas=(0.9, 0.98))
    for _ in range(steps):
        optimizer.zero_grad()
        (-expected_rewards(policies, rewards)).sum().backward()
        optimizer.step()
    return policies.map(lambda each: each.detach()), rewards


def sides(scenario: Scenario, seeds: Sequence[int]) -> tuple[Policies, Policies, Tensor]:
    """The sampler and the trainer of each seed, a lane each, and the rewards of all responses."""
    trainer, rewards = learnt_policies(seeds, LEARNT)
    older, _ = learnt_policies(seeds, LEARNT - scenario.lag)
    return older.with_errors(fixed_errors(scenario.error, seeds)), trainer, rewards


def mismatch_of(rollout: Rollout) -> dict[str, Tensor]:
    """Figures of all responses, exact, `[seeds]` each, by the names of `router_replay.mismatch.diagnose`."""
    ratio = rollout.ratios.token.unflatten(0, rollout.shares.shape)
    shares = rollout.shares / PROMPTS
    of_token = {
        "k3": torch.expm1(ratio) - ratio,
        "f_tau_2": (ratio.abs() > math.log(2)).double(),
        "token": (2 * ratio).exp(),
    }
    means = {name: (shares * each.mean(-1)).sum(-1) for name, each in of_token.items()}
    ess_sequence = 1 / (shares * (2 * ratio.sum(-1)).exp()).sum(-1)
    return {
        "k3": means["k3"],
        "f_tau_2": means["f_tau_2"],
        "ess_token": 1 / means["token"],
        "ess_sequence": ess_sequence,
    }


def ascent(correction: Correction, rollout: Rollout, policies: Policies) -> Tensor:
    """The direction in which a correction's loss moves each lane's parameters, `[L, number of them]`."""
    trainable = policies.trainable()
    (-correction.loss(rollout)(trainable.log_distributions(rollout.tokens))).backward()
    return flat_gradients(trainable)


def errors_of(
    scenario: Scenario, seeds: Sequence[int], batches: int, advance: Callable[[], object] = lambda: None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Of each correction `bias`, `resolution` and `noise`, `[seeds]`, in norms of the exact gradient; and the mismatch.

    Noise is the root of the summed variance of a batch's gradient, `GROUP_SIZE` responses to each prompt.

    Args:
        batches: that are sampled for each seed; the more, the better what is sampled is resolved.
        advance: called after each correction.
    """
    sampler, trainer, rewards = sides(scenario, seeds)
    truth = gradients(trainer, rewards)
    norm = truth.norm(dim=-1)
    listed = Rollout.of_all(sampler, trainer, rewards)
    lane = torch.arange(len(seeds)).repeat_interleave(batches)
    size = (batches, PROMPTS * GROUP_SIZE, LENGTH + 1)
    drawn = [torch.rand(size, generator=each, dtype=torch.float64) for each in generators(seeds, 5)]
    sampled_trainer = trainer.map(lambda each: each[lane])
    rollout = Rollout.sampled(sampler.map(lambda each: each[lane]), sampled_trainer, rewards[lane], torch.cat(drawn))
    means: dict[str, Tensor] = {}
    samples: dict[str, Tensor] = {}
    found: dict[str, dict[str, Tensor]] = {}
    for name, correction in CORRECTIONS.items():
        samples[name] = ascent(correction, rollout, sampled_trainer).unflatten(0, (len(seeds), batches))
        if correction.like is None:
            means[name] = ascent(correction, listed, trainer)
            unresolved = torch.zeros_like(norm)
        else:
            apart = samples[name] - samples[correction.like]
            means[name] = means[correction.like] + apart.mean(1)
            unresolved = apart.var(1).sum(-1) / batches
        # What the mean of samples is off by is part of its distance from the truth.
        bias = ((means[name] - truth).square().sum(-1) - unresolved).clamp(min=0).sqrt()
        noise = samples[name].var(1).sum(-1).sqrt()
        found[name] = {"bias": bias / norm, "resolution": unresolved.sqrt() / norm, "noise": noise / norm}
        advance()
    return found, mismatch_of(listed)
