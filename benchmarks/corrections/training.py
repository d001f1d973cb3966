"""Training to the end under each correction, on rollouts of a sampler that is not quite the trainer's policy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.corrections.estimators import CORRECTIONS
from benchmarks.corrections.policies import LENGTH, PROMPTS, SHAPES, Policies, expected_rewards, normal, random_rewards
from benchmarks.corrections.rollouts import Rollout

GROUP_SIZE = 8

EXACT, SAME, FRESH = "no error", "same error", "fresh error"
"""Kinds of the sampler's errors: none, one that is the same function of the weights in every step, another in each."""

_KINDS = (EXACT, SAME, FRESH)


@dataclass(frozen=True)
class Regime:
    """How a job learns, and which errors its sampler has.

    Attributes:
        updates: of each rollout, each on the whole of it.
        lag: rollouts by which the sampler's weights are older than the trainer's.
        rate: Adam's learning rate.
        kinds: of the sampler's errors.
        error: standard deviation of the relative error of each of the sampler's weights.
    """

    name: str
    updates: int = 1
    lag: int = 0
    rate: float = 0.02
    kinds: tuple[str, ...] = (SAME, FRESH)
    error: float = 0.5


REGIMES = (
    Regime("on-policy, small error", error=0.15),
    Regime("on-policy"),
    Regime("on-policy, 4 times the rate", rate=0.08),
    Regime("off-policy, 4 updates", updates=4),
    Regime("stale, 8 rollouts", lag=8, kinds=(EXACT, SAME)),
)


@dataclass(frozen=True, eq=False)
class Arms:
    """What is trained side by side: for each correction and kind of errors a policy of each seed.

    The first is the control: no correction, no errors, and no lag.

    Attributes:
        names: correction and kind of each arm, the control's kind being `EXACT`.
        parts: lanes of each correction, of all of its arms.
    """

    names: list[tuple[str, str]]
    parts: dict[str, slice]
    num_seeds: int

    @classmethod
    def of(cls, kinds: Sequence[str], num_seeds: int) -> Arms:
        """All corrections under these kinds of errors."""
        control = ("none", EXACT)
        names = [control, *((correction, kind) for correction in CORRECTIONS for kind in kinds)]
        parts = {}
        for correction in CORRECTIONS:
            places = [place for place, (name, _) in enumerate(names) if name == correction]
            parts[correction] = slice(places[0] * num_seeds, (places[-1] + 1) * num_seeds)
        return cls(names, parts, num_seeds)

    @property
    def seed(self) -> Tensor:
        """Number of each lane's seed."""
        return torch.arange(self.num_seeds).repeat(len(self.names))

    @property
    def kind(self) -> Tensor:
        """Number of each lane's kind in `_KINDS`."""
        return torch.tensor([_KINDS.index(kind) for _, kind in self.names]).repeat_interleave(self.num_seeds)

    def is_control(self, like: Tensor) -> Tensor:
        """Of each lane, with as many dimensions as a parameter."""
        lane = torch.arange(len(self.names) * self.num_seeds)
        return (lane < self.num_seeds).view(-1, *[1] * (like.dim() - 1))


def generators(seeds: Sequence[int], purpose: int) -> list[torch.Generator]:
    """One for each seed, so that its numbers do not hang on which other seeds there are."""
    return [torch.Generator().manual_seed(1000 * seed + purpose) for seed in seeds]


def first_policies(seeds: Sequence[int]) -> tuple[Policies, Tensor]:
    """Of each seed, a lane each, and the rewards of all responses."""
    policies = Policies.random(generators(seeds, 0))
    return policies, random_rewards(generators(seeds, 1), policies)


def fixed_errors(size: float, seeds: Sequence[int]) -> list[Tensor]:
    """Relative errors of each seed's weights, of this standard deviation, that are the same whenever they are asked."""
    return [size * each for each in normal(generators(seeds, 2), *SHAPES)]


def train(
    regime: Regime, seeds: Sequence[int], rollouts: int, points: int, advance: Callable[[], object] = lambda: None
) -> dict[tuple[str, str], Tensor]:
    """Exact expected rewards `[points + 1, seeds]` of each arm, at the start and after equal parts; the control first.

    All arms of a seed begin with the same policy, and draw by the same numbers.

    Args:
        rollouts: of `GROUP_SIZE` responses to each prompt, a multiple of `points`.
        advance: called after each of them.
    """
    arms = Arms.of(regime.kinds, len(seeds))
    seed, kind = arms.seed, arms.kind
    first, reward_table = first_policies(seeds)
    rewards, policies = reward_table[seed], first.map(lambda each: each[seed]).trainable()
    optimizer = torch.optim.Adam(policies.tensors, lr=regime.rate, betas=(0.9, 0.98))
    each_time, draws = (generators(seeds, purpose) for purpose in (3, 4))
    same = fixed_errors(regime.error, seeds)
    older = deque([policies.map(_kept)], maxlen=regime.lag + 1)
    reached = [expected_rewards(policies, rewards).detach()]
    for number in range(1, rollouts + 1):
        errors = [
            torch.stack([torch.zeros_like(a), a, regime.error * b])[kind, seed]
            for a, b in zip(same, normal(each_time, *SHAPES), strict=True)
        ]
        weights = Policies(
            *(
                torch.where(arms.is_control(old), new, old)
                for old, new in zip(older[0].tensors, older[-1].tensors, strict=True)
            )
        )
        size = (PROMPTS * GROUP_SIZE, LENGTH + 1)
        uniforms = torch.stack([torch.rand(size, generator=each, dtype=torch.float64) for each in draws])[seed]
        rollout = Rollout.sampled(weights.with_errors(errors), policies, rewards, uniforms)
        losses = [CORRECTIONS[name].loss(rollout.lanes(part)) for name, part in arms.parts.items()]
        for _ in range(regime.updates):
            optimizer.zero_grad()
            current = policies.log_distributions(rollout.tokens)
            found = [loss(current[part]) for loss, part in zip(losses, arms.parts.values(), strict=True)]
            torch.stack(found).sum().backward()
            optimizer.step()
        older.append(policies.map(_kept))
        if number % (rollouts // points) == 0:
            reached.append(expected_rewards(policies, rewards).detach())
        advance()
    by_arm = torch.stack(reached).unflatten(1, (len(arms.names), len(seeds)))
    # The control's name may be that of an arm, too: of one with a lag.
    return {("control", EXACT): by_arm[:, 0]} | {name: by_arm[:, at] for at, name in enumerate(arms.names) if at}


def _kept(parameter: Tensor) -> Tensor:
    return parameter.detach().clone()
