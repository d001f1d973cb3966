"""Responses that a sampler drew, or all that it may draw, beside what a trainer makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.corrections.policies import LENGTH, PROMPTS, Policies, all_responses, rewards_of, values
from router_replay import mismatch
from router_replay.mismatch import LogRatios, Responses


@dataclass(frozen=True, eq=False)
class Rollout:
    """The same number n of responses to each prompt, in L lanes: B = P * n each, by prompt.

    Attributes:
        tokens: `[L, B, T]`.
        rollout: log-probabilities of all next tokens under the sampler, `[L, B, T, V]`.
        trainer: the same under the trainer's policy before any update.
        rewards: `[L, B]`.
        policies, reward_table: the trainer's policy before any update, and rewards of all responses, `[L, P, V^T]`.
        uniforms: numbers in [0, 1) for what draws itself, `[L, B]`.
        shares: what a response counts, `[L, B]`: 1 / n of a sample, the sampler's probability where all are listed.
        listed: whether all responses are here, in place of samples.
    """

    tokens: Tensor
    rollout: Tensor
    trainer: Tensor
    rewards: Tensor
    policies: Policies
    reward_table: Tensor
    uniforms: Tensor
    shares: Tensor
    listed: bool

    @classmethod
    def sampled(cls, sampler: Policies, trainer: Policies, rewards: Tensor, uniforms: Tensor) -> Rollout:
        """By numbers in [0, 1), `[L, B, T + 1]`, of which the last is for what draws itself."""
        tokens = sampler.sample(uniforms[..., :LENGTH])
        shares = torch.full(tokens.shape[:2], PROMPTS / tokens.shape[1], dtype=torch.float64)
        return cls._of(tokens, sampler, trainer, rewards, uniforms[..., -1], shares, listed=False)

    @classmethod
    def of_all(cls, sampler: Policies, trainer: Policies, rewards: Tensor) -> Rollout:
        """Every response there is."""
        tokens = all_responses().repeat(PROMPTS, 1).expand(len(rewards), -1, -1)
        shares = sampler.probabilities().flatten(1)
        return cls._of(tokens, sampler, trainer, rewards, torch.zeros_like(shares), shares, listed=True)

    @classmethod
    @torch.no_grad()
    def _of(
        cls,
        tokens: Tensor,
        sampler: Policies,
        trainer: Policies,
        rewards: Tensor,
        uniforms: Tensor,
        shares: Tensor,
        *,
        listed: bool,
    ) -> Rollout:
        return cls(
            tokens,
            sampler.log_distributions(tokens),
            trainer.log_distributions(tokens),
            rewards_of(rewards, tokens),
            trainer.map(lambda each: each.detach().clone()),
            rewards,
            uniforms,
            shares,
            listed,
        )

    def lanes(self, part: slice) -> Rollout:
        """Some of the lanes."""
        names = ("tokens", "rollout", "trainer", "rewards", "reward_table", "uniforms", "shares")
        policies = self.policies.map(lambda each: each[part])
        return replace(self, policies=policies, **{name: getattr(self, name)[part] for name in names})

    @property
    def num_responses(self) -> int:
        """Responses n to a prompt."""
        return self.tokens.shape[1] // PROMPTS

    @cached_property
    def responses(self) -> Responses:
        """One batch of all lanes, `[L * B, T]`; a group is a prompt of a lane."""
        lanes, batch, length = self.tokens.shape
        group_ids = torch.arange(lanes * PROMPTS).repeat_interleave(self.num_responses)
        return Responses.padded(torch.ones(lanes * batch, length, dtype=torch.bool), group_ids)

    @cached_property
    def ratios(self) -> LogRatios:
        """Of the trainer's policy before any update."""
        trainer, rollout = (self.of_sampled(each) for each in (self.trainer, self.rollout))
        return LogRatios.of(trainer=trainer, rollout=rollout, responses=self.responses)

    def of_sampled(self, log_distributions: Tensor) -> Tensor:
        """Log-probabilities of the tokens that were sampled: `[L, B, T, V]` to `[L * B, T]`."""
        return log_distributions.gather(-1, self.tokens[..., None])[..., 0].flatten(0, 1)

    @property
    def values(self) -> Tensor:
        """Expected reward of each prefix under the trainer's policy, exact, `[L * B, T]`: what a critic estimates."""
        return values(self.policies, self.reward_table, self.tokens).flatten(0, 1)

    @cached_property
    def advantages(self) -> Tensor:
        """Rewards over the mean of the *other* responses to the prompt, `[L * B]`: a baseline that adds no bias."""
        if self.listed:
            by_prompt = (self.rewards * self.shares).unflatten(1, (PROMPTS, -1)).sum(-1)
            return (self.rewards - by_prompt.repeat_interleave(self.num_responses, 1)).flatten()
        over_all = mismatch.group_relative_advantages(self.rewards.flatten(), self.responses, divide_by_std=False)
        return over_all * self.num_responses / (self.num_responses - 1)
