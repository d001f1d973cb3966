"""Losses in closed form on a few tokens: what is counted, what gradients reach, and what extremes do."""

from __future__ import annotations

import math

import pytest
import torch

from router_replay.errors import InputError
from router_replay.mismatch import Responses, aggregate, decoupled_loss, grpo_loss, gspo_loss
from tests.router_replay.mismatch.pairs import log_ratios

MASK = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]])
RESPONSES = Responses.padded(MASK)
NAN = MASK == 0


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _logs(seed: int) -> torch.Tensor:
    return (-_random(seed, 4, 3) - 1).masked_fill(NAN, math.nan)


def _grpo(current, old, advantages, responses, **options) -> torch.Tensor:
    return grpo_loss(current=current, old=old, advantages=advantages, responses=responses, **options)[0]


def test_means_count_response_tokens_or_sequences_that_have_any():
    losses = torch.tensor([[1.0, 2.0, 9.0], [9.0, 4.0, 8.0], [9.0, 9.0, 9.0], [3.0, 3.0, 6.0]])
    assert aggregate(losses, RESPONSES).item() == pytest.approx(27 / 7)
    assert aggregate(losses, RESPONSES, "sequence-mean").item() == pytest.approx((1.5 + 6 + 4) / 3)
    assert aggregate(losses, RESPONSES, denominator=14).item() == pytest.approx(27 / 14)
    assert aggregate(losses, RESPONSES, "sequence-mean", torch.tensor(6.0)).item() == pytest.approx(11.5 / 6)
    for denominator in (0, -1.0):
        with pytest.raises(InputError, match="denominator"):
            aggregate(losses, RESPONSES, denominator=denominator)
    with pytest.raises(InputError, match="aggregation"):
        aggregate(losses, RESPONSES, "sum")


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
def test_micro_batches_with_the_global_denominator_add_up(aggregation):
    given, advantages = [_logs(seed) for seed in (0, 1)], _random(2, 4) - 0.5
    whole = _grpo(*given, advantages, RESPONSES, aggregation=aggregation)
    count = 7 if aggregation == "token-mean" else 3
    parts = [
        _grpo(
            *(each[[row]] for each in given),
            advantages[[row]],
            Responses.padded(MASK[[row]]),
            aggregation=aggregation,
            denominator=count,
        )
        for row in range(4)
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-15)


def _calls() -> dict:
    one_each = _random(3, 4) - 0.5
    return {
        "grpo": lambda *logs, **o: _grpo(*logs[:2], one_each, RESPONSES, **o),
        "gspo": lambda current, old, _, **o: gspo_loss(
            current=current, old=old, advantages=one_each, responses=RESPONSES, clip_low=0.5, clip_high=0.5, **o
        )[0],
        "decoupled": lambda current, proximal, rollout, **o: decoupled_loss(
            log_ratios(proximal, rollout, RESPONSES), current=current, advantages=one_each, **o
        )[0],
    }


@pytest.mark.parametrize("name", _calls())
def test_gradients_reach_the_current_policy_only_and_padding_reaches_nothing(name):
    """Weights, advantages and log-probabilities of padding are NaN; those of the other policies ask for gradients."""
    logs = [_logs(seed).requires_grad_() for seed in (0, 1, 2)]
    weights = _random(4, 4, 3).masked_fill(NAN, math.nan).requires_grad_()
    loss = _calls()[name](*logs, weights=weights)
    assert loss.isfinite()
    loss.backward()
    assert logs[0].grad.isfinite().all() and not logs[0].grad[NAN].any() and logs[0].grad.any()
    assert logs[1].grad is None and logs[2].grad is None and weights.grad is None


def test_advantages_carry_no_gradient_and_may_be_nan_in_padding():
    advantages = (_random(0, 4, 3) - 0.5).masked_fill(NAN, math.nan).requires_grad_()
    current = _logs(1).requires_grad_()
    grpo_loss(current=current, old=_logs(2), advantages=advantages, responses=RESPONSES)[0].backward()
    assert advantages.grad is None and current.grad.isfinite().all()


def test_advantages_of_sequences_are_those_of_all_their_tokens():
    advantages = _random(0, 4) - 0.5
    loss = grpo_loss(current=_logs(1), old=_logs(2), advantages=advantages, responses=RESPONSES)[0]
    assert loss.equal(
        grpo_loss(current=_logs(1), old=_logs(2), advantages=advantages[:, None].expand(4, 3), responses=RESPONSES)[0]
    )
    with pytest.raises(InputError, match="one advantage for each sequence"):
        gspo_loss(current=_logs(1), old=_logs(2), advantages=advantages[:, None].expand(4, 3), responses=RESPONSES)[0]


@pytest.mark.parametrize("ratio", [0.0, 1e-30, 0.5, 1.5, 1e18])
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 2.0])
def test_the_clipped_loss_and_its_slope_in_closed_form(ratio, advantage):
    current = torch.tensor([[math.log(ratio) - 50 if ratio else -math.inf]], dtype=torch.float64, requires_grad=True)
    old, one = torch.full((1, 1), -50.0, dtype=torch.float64), Responses.padded(torch.ones(1, 1))
    loss = grpo_loss(
        current=current, old=old, advantages=torch.tensor([advantage]), responses=one, clip_low=0.1, clip_high=0.3
    )[0]
    loss.backward()
    clipped = min(max(ratio, 0.9), 1.3)
    # A logarithm of 91 with an error of one eps: 2e-14 of the ratio.
    assert loss.item() == pytest.approx(-min(ratio * advantage, clipped * advantage), rel=1e-13)
    slope = -ratio * advantage if ratio * advantage < clipped * advantage or clipped == ratio else 0.0
    assert current.grad.item() == pytest.approx(slope, rel=1e-13)


def test_the_decoupled_loss_multiplies_further_weights_with_its_own():
    """Capped at 2 by default: ratios of 1.5 and 5 and weights of 1/4 and 3."""
    logs = torch.tensor([[1.5, 5.0]]).log() - 5
    weights, one = torch.tensor([[0.25, 3.0]]), Responses.padded(torch.ones(1, 2))
    loss = decoupled_loss(
        log_ratios(logs, torch.full((1, 2), -5.0), one), current=logs, advantages=torch.ones(1), weights=weights
    )[0]
    # Float32 logarithms of size 5: a few 1e-6 of a ratio.
    assert loss.item() == pytest.approx(-(1.5 * 0.25 + 2 * 3) / 2, rel=4e-6)
    unbounded = decoupled_loss(
        log_ratios(logs, torch.full((1, 2), -5.0), one), current=logs, advantages=torch.ones(1), cap=math.inf
    )[0]
    assert unbounded.item() == pytest.approx(-(1.5 + 5) / 2, rel=4e-6)


@pytest.mark.parametrize("name", _calls())
def test_ratios_beyond_the_range_of_floats_leave_loss_and_gradient_finite(name):
    logs = [_logs(seed).float() for seed in (0, 1, 2)]
    logs[1] = logs[1] - 1e4
    current = logs[0].clone().requires_grad_()
    loss = _calls()[name](current, *logs[1:])
    loss.backward()
    assert loss.isfinite() and current.grad.isfinite().all()


def test_a_batch_without_response_tokens_has_loss_zero_and_a_gradient_of_zeros():
    current = torch.full((2, 3), -1.0, requires_grad=True)
    nothing = Responses.padded(torch.zeros(2, 3))
    for aggregation in ("token-mean", "sequence-mean"):
        loss = grpo_loss(
            current=current, old=current, advantages=torch.ones(2), responses=nothing, aggregation=aggregation
        )[0]
        (gradient,) = torch.autograd.grad(loss, current)
        assert loss.item() == 0 and not gradient.any()


@pytest.mark.parametrize("clip", [(-0.1, 0.2), (1.1, 0.2), (0.2, -0.1)])
def test_a_clip_range_must_hold_one(clip):
    with pytest.raises(InputError, match="clip range"):
        grpo_loss(
            current=_logs(0),
            old=_logs(1),
            advantages=torch.ones(4),
            responses=RESPONSES,
            clip_low=clip[0],
            clip_high=clip[1],
        )[0]
