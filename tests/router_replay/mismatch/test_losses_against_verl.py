"""Losses, their gradients, and advantages against verl's own on random batches, where both mean the same.

Float64 throughout. A loss is a sum of about 100 terms of size below 10 over a count: rounding is below 1e-13.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import (
    compute_grpo_outcome_advantage,
    compute_optimal_token_baseline_advantage,
    compute_policy_loss_gspo,
    compute_policy_loss_vanilla,
)
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.workers.config.actor import ActorConfig

from router_replay.mismatch import (
    decoupled_loss,
    group_relative_advantages,
    grpo_loss,
    gspo_loss,
    optimal_token_baseline_advantages,
)
from tests.router_replay.mismatch.pairs import log_ratios
from tests.router_replay.mismatch.verl_batches import Batch, random_batch

BATCHES = [
    {"seed": 10},
    {"seed": 11, "holes": True, "empty": True},
    {"seed": 12, "rows": 3, "width": 20, "holes": True},
]
MODES = {"token-mean": "token-mean", "sequence-mean": "seq-mean-token-mean"}


@pytest.fixture(params=BATCHES, ids=lambda options: f"batch{options['seed']}")
def batch(request) -> Batch:
    return random_batch(**request.param)


@functools.cache
def _config(low: float, high: float) -> ActorConfig:
    """Dual clip out of reach."""
    return ActorConfig(
        strategy="fsdp",
        ppo_micro_batch_size_per_gpu=1,
        rollout_n=1,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=1e9,
    )


def _advantages(batch: Batch) -> Tensor:
    """One for each sequence, of both signs."""
    return torch.linspace(-1.5, 2, len(batch.mask), dtype=torch.float64)


def _same(batch: Batch, ours, theirs) -> None:
    """Value, and gradient with respect to the current log-probabilities."""
    found, expected = (batch.current.clone().requires_grad_() for _ in range(2))
    loss, reference = ours(found), theirs(expected)
    assert loss.item() == pytest.approx(reference.item(), abs=1e-13) and loss.item() != 0
    loss.backward()
    reference.backward()
    assert expected.grad.count_nonzero() > 0
    torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-13)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("aggregation", MODES)
@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.1, 0.28)])
def test_the_clipped_loss_is_verls(batch, clip, aggregation, weighted):
    advantages = _advantages(batch)[:, None] + torch.linspace(-1, 1, batch.mask.shape[1], dtype=torch.float64)
    weights = (batch.trainer - batch.rollout).exp().clamp(max=2) if weighted else None
    _same(
        batch,
        lambda current: grpo_loss(
            current=current,
            old=batch.trainer,
            advantages=advantages,
            responses=batch.responses,
            clip_low=clip[0],
            clip_high=clip[1],
            weights=weights,
            aggregation=aggregation,
        )[0],
        lambda current: compute_policy_loss_vanilla(
            batch.trainer, current, advantages, batch.mask, MODES[aggregation], _config(*clip), weights
        )[0],
    )


def test_the_defaults_are_a_clip_of_one_fifth_and_a_mean_over_sequences():
    batch = random_batch(13)
    advantages = _advantages(batch)
    _same(
        batch,
        lambda current: grpo_loss(current=current, old=batch.trainer, advantages=advantages, responses=batch.responses)[
            0
        ],
        lambda current: compute_policy_loss_vanilla(
            batch.trainer,
            current,
            advantages[:, None].expand_as(current),
            batch.mask,
            "seq-mean-token-mean",
            _config(0.2, 0.2),
        )[0],
    )


@pytest.mark.parametrize("cap", [1.5, None])
def test_the_decoupled_loss_is_verls_clipped_loss_with_its_truncated_weights(batch, cap):
    """Default: cap 2."""
    advantages = _advantages(batch)[:, None].expand_as(batch.current)
    weights, _ = compute_rollout_correction_weights(batch.trainer - batch.rollout, batch.mask, "token", cap or 2.0)
    options = {"aggregation": "token-mean"} | ({} if cap is None else {"cap": cap})
    _same(
        batch,
        lambda current: decoupled_loss(
            log_ratios(batch.trainer, batch.rollout, batch.responses), current=current, advantages=advantages, **options
        )[0],
        lambda current: compute_policy_loss_vanilla(
            batch.trainer, current, advantages, batch.mask, "token-mean", _config(0.2, 0.2), weights
        )[0],
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("clip", [(0.2, 0.3), (3e-4, 4e-4)])
def test_the_sequence_loss_is_verls(batch, clip, weighted):
    """Value and gradient: verl's goes through every token, ours through their mean; one weight for each sequence."""
    advantages = _advantages(batch)
    weights = batch.responses.expand(torch.linspace(0.3, 2, len(batch.mask)).double()) if weighted else None
    _same(
        batch,
        lambda current: gspo_loss(
            current=current,
            old=batch.trainer,
            advantages=advantages,
            responses=batch.responses,
            clip_low=clip[0],
            clip_high=clip[1],
            weights=weights,
        )[0],
        lambda current: compute_policy_loss_gspo(
            batch.trainer,
            current,
            advantages[:, None].expand_as(current),
            batch.mask,
            "seq-mean-token-mean",
            _config(*clip),
            weights,
        )[0],
    )


def test_the_sequence_losss_default_bounds_are_the_papers():
    """-min(s A, clip(s) A): with A = 1 and s far above it is -(1 + 4e-4), with A = -1 and s far below 1 - 3e-4."""
    batch = random_batch(14)
    for shift, advantage, expected in ((1.0, 1.0, -1.0004), (-1.0, -1.0, 0.9997)):
        advantages = torch.full((len(batch.mask),), advantage, dtype=torch.float64)
        loss = gspo_loss(
            current=batch.trainer - 1 + shift, old=batch.trainer - 1, advantages=advantages, responses=batch.responses
        )[0]
        assert loss.item() == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("divide", [True, False])
def test_group_relative_advantages_are_verls_for_groups_of_two_and_more(divide):
    for seed in range(5):
        batch = random_batch(seed)
        theirs, _ = compute_grpo_outcome_advantage(
            batch.rewards_at_the_end, batch.mask, batch.index, norm_adv_by_std_in_grpo=divide
        )
        ours = group_relative_advantages(batch.rewards, batch.responses, divide_by_std=divide)
        # Divided by a standard deviation of 0.1 and more.
        torch.testing.assert_close(batch.responses.expand(ours), theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_optimal_token_baseline_is_verls(seed, weighted):
    """Responses without tokens of others in between; a group of one, and a response that is longest by itself."""
    batch = random_batch(seed, empty=seed == 3)
    index = np.where(np.arange(len(batch.index)) == 5, 77, batch.index)
    groups = [np.flatnonzero(index == each) for each in np.unique(index)]
    lengths = batch.mask.sum(-1).numpy()
    tops = [np.sort(lengths[group])[-2:] for group in groups if len(group) > 1]
    assert any(top[0] < top[1] for top in tops) and len(groups) == 4
    generator = torch.Generator().manual_seed(seed)
    probabilities = batch.trainer.exp()
    squares = probabilities**2 + (1 - probabilities) ** 2 * torch.rand(batch.mask.shape, generator=generator)
    weights = (batch.trainer - batch.rollout).exp().clamp(max=2) if weighted else None
    rewards = torch.randn(batch.mask.shape, generator=generator, dtype=torch.float64)
    theirs, _ = compute_optimal_token_baseline_advantage(
        rewards, batch.mask, index, batch.trainer, squares, weights, epsilon=0.0
    )
    # Without its 1e-8 verl divides 0 by 0 where no response is left, and the mask does not mend it.
    theirs = theirs.masked_fill(batch.mask == 0, 0)
    responses = type(batch.responses).padded(batch.mask, torch.tensor(index))
    ours = optimal_token_baseline_advantages(rewards, batch.trainer, squares, responses, weights=weights)
    # Sums of 10 positive energies: a baseline is an average of returns of size 10.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    at_the_end, _ = compute_optimal_token_baseline_advantage(
        batch.rewards_at_the_end, batch.mask, index, batch.trainer, squares, weights, epsilon=0.0
    )
    ours = optimal_token_baseline_advantages(batch.rewards, batch.trainer, squares, responses, weights=weights)
    torch.testing.assert_close(ours, at_the_end.masked_fill(batch.mask == 0, 0), rtol=0, atol=1e-12)
