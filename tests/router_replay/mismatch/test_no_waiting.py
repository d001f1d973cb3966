"""Losses, weights, masks and advantages wait for the device only where their docstrings say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from router_replay import mismatch
from router_replay.mismatch import LogRatios, Responses
from tests.no_waiting import RefuseWaiting
from tests.router_replay.mismatch.pairs import log_ratios


@dataclass(frozen=True)
class Given:
    """A packed batch whose log-probabilities were checked."""

    ratios: LogRatios
    current: Tensor
    rewards: Tensor
    values: Tensor

    @property
    def responses(self) -> Responses:
        return self.ratios.responses

    def loss(self, which: Callable[..., Any]) -> Tensor:
        current = self.current.clone().requires_grad_()
        loss, metrics = which(
            current=current, old=self.ratios.trainer, advantages=self.rewards, responses=self.responses
        )
        loss.backward()
        (metrics + metrics).weight_ess.sum()
        return current.grad


def _given() -> Given:
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 0, 1, 30, 2]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    rollout, noise, other, values = torch.rand(4, 38, generator=generator)
    responses = Responses.packed(torch.rand(38, generator=generator) < 0.7, bounds, [0, 0, 1, 1, 0])
    ratios = log_ratios(-rollout - 0.1 * noise - 0.01, -rollout - 0.01, responses)
    return Given(ratios, -rollout - 0.1 * other - 0.01, torch.randn(5, generator=generator), values)


FREE: dict[str, Callable[[Given], Any]] = {
    **{
        f"TIS, {level}": lambda given, level=level: mismatch.truncated_importance_weights(given.ratios, level=level)
        for level in ("token", "sequence", "geometric")
    },
    "MIS": lambda given: mismatch.masked_importance_weights(given.ratios, level="sequence"),
    "IcePop": lambda given: mismatch.icepop_weights(given.ratios),
    **{
        f"SNIS, {level} of a {over}": lambda given, level=level, over=over: mismatch.self_normalized_weights(
            given.ratios, level=level, over=over
        )
        for level in ("token", "sequence")
        for over in ("batch", "group")
    },
    "metropolis, sequences": lambda given: mismatch.metropolis_chain(given.ratios),
    "metropolis, tokens": lambda given: mismatch.metropolis_chain(given.ratios, level="token"),
    "veto": lambda given: mismatch.catastrophic_token_veto(given.ratios),
    "trust region": lambda given: mismatch.trust_region_mask(given.ratios),
    "off-policy sequences": lambda given: mismatch.off_policy_sequence_mask(given.ratios, given.rewards),
    "group-relative": lambda given: mismatch.group_relative_advantages(given.rewards, given.responses),
    "token baseline": lambda given: mismatch.optimal_token_baseline_advantages(
        given.rewards, given.current, given.values, given.responses
    ),
    "doubly robust": lambda given: mismatch.doubly_robust_advantages(
        given.rewards, given.values, given.values, given.responses
    ),
    "grpo": lambda given: given.loss(mismatch.grpo_loss),
    "gspo": lambda given: given.loss(mismatch.gspo_loss),
    "decoupled": lambda given: mismatch.decoupled_loss(given.ratios, current=given.current, advantages=given.rewards),
    "keep": lambda given: given.responses.keep(given.ratios.token > 0).lengths,
}


@pytest.mark.parametrize("name", FREE)
def test_nothing_waits_once_log_probabilities_are_checked(name):
    given = _given()
    with RefuseWaiting():
        FREE[name](given)
