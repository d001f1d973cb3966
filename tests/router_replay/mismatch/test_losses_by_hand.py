"""Losses and their gradients on one or two responses, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from router_replay.errors import InputError
from router_replay.mismatch import (
    Responses,
    decoupled_loss,
    grpo_loss,
    gspo_loss,
    truncated_importance_weights,
)
from tests.router_replay.mismatch.pairs import log_ratios

ONE = Responses.padded(torch.ones(1, 1))
TWO = Responses.padded(torch.tensor([[1, 1, 1], [1, 0, 0]]))


def _one(ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Current and old log-probability of one token with this ratio."""
    old = torch.tensor([[-2.0]], dtype=torch.float64)
    return (old + math.log(ratio)).requires_grad_(), old


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "moves"),
    [
        (1.1, 2.0, -2.2, True),
        (1.5, 2.0, -2.4, False),  # a good token is not made more probable beyond the range
        (0.5, 2.0, -1.0, True),  # but may come back into it
        (0.9, -2.0, 1.8, True),
        (0.5, -2.0, 1.6, False),
        (1.5, -2.0, 3.0, True),
    ],
)
def test_clipping_stops_only_steps_that_lead_further_away(ratio, advantage, loss, moves):
    current, old = _one(ratio)
    found = grpo_loss(
        current=current, old=old, advantages=torch.tensor([advantage], dtype=torch.float64), responses=ONE
    )[0]
    found.backward()
    assert found.item() == pytest.approx(loss)
    # d/d log pi of -r A is -r A itself.
    assert current.grad.item() == pytest.approx(-ratio * advantage if moves else 0.0)


def _grpo(current, old, advantages, **options) -> float:
    return grpo_loss(current=current, old=old, advantages=advantages, responses=ONE, **options)[0].item()


def test_ranges_may_differ_by_side():
    advantage = torch.ones(1, dtype=torch.float64)
    assert _grpo(*_one(2.0), advantage, clip_high=0.28) == pytest.approx(-1.28)
    assert _grpo(*_one(0.1), -advantage, clip_low=0.4) == pytest.approx(0.6)


def test_a_weight_of_zero_stays_in_the_denominator_and_keep_takes_it_out():
    current = torch.full((2, 3), -1.0)
    kept = torch.tensor([[1, 0, 0], [1, 0, 0]]) > 0
    ones = torch.ones(2)
    assert (
        grpo_loss(
            current=current, old=current, advantages=ones, responses=TWO, weights=kept.float(), aggregation="token-mean"
        )[0].item()
        == -0.5
    )
    assert (
        grpo_loss(current=current, old=current, advantages=ones, responses=TWO.keep(kept), aggregation="token-mean")[
            0
        ].item()
        == -1
    )
    nothing = TWO.keep(torch.zeros_like(kept))
    assert grpo_loss(current=current, old=current, advantages=ones, responses=nothing)[0].item() == 0


def _gspo_ratio(responses: Responses, weights: torch.Tensor | None = None) -> tuple[float, torch.Tensor]:
    """Loss of an advantage of -1 for the first of two responses, its ratio times its weight, and the slopes."""
    old = torch.full((2, 3), -2.0, dtype=torch.float64)
    current = (old + torch.tensor([[0.3, -0.2, 0.5], [0.1, 0, 0]])).requires_grad_()
    wide = {"clip_low": 1.0, "clip_high": math.inf}
    loss, _ = gspo_loss(
        current=current, old=old, advantages=torch.tensor([-1.0, 0.0]), responses=responses, weights=weights, **wide
    )
    loss.backward()
    return loss.item() * int((responses.lengths > 0).sum()), current.grad[0]


def test_gspos_ratio_is_of_the_tokens_that_keep_leaves():
    """Of log-ratios 0.3, -0.2 and 0.5: 0.2 is the mean of the response, 0.4 that of the first and last."""
    tokens = torch.tensor([[True, False, True], [True, False, False]])
    whole, slopes = _gspo_ratio(TWO)
    assert whole == pytest.approx(math.exp(0.2)) and slopes.tolist() == pytest.approx([math.exp(0.2) / 6] * 3)
    kept, slopes = _gspo_ratio(TWO.keep(tokens))
    assert kept == pytest.approx(math.exp(0.4)) and slopes.tolist() == pytest.approx(
        [math.exp(0.4) / 4, 0, math.exp(0.4) / 4]
    )
    # As weights the mask leaves the ratio, and counts by the share of tokens that stay.
    weighed, slopes = _gspo_ratio(TWO, tokens.double())
    assert weighed == pytest.approx(2 / 3 * math.exp(0.2))
    assert slopes.tolist() == pytest.approx([2 / 3 * math.exp(0.2) / 6] * 3)
    # Of responses that leave as a whole the others know nothing but the denominator.
    alone, slopes = _gspo_ratio(TWO.keep(torch.tensor([[True] * 3, [False] * 3])))
    assert alone == pytest.approx(math.exp(0.2)) and slopes.tolist() == pytest.approx([math.exp(0.2) / 3] * 3)


def test_gspo_moves_a_sequence_as_a_whole():
    old = torch.full((2, 3), -2.0, dtype=torch.float64)
    current = old.clone()
    current[0] += torch.tensor([0.3, -0.2, 0.2])
    current.requires_grad_()
    loss = gspo_loss(
        current=current, old=old, advantages=torch.tensor([1.0, 0.0]), responses=TWO, clip_low=0.2, clip_high=0.2
    )[0]
    loss.backward()
    ratio = math.exp(0.1)
    assert loss.item() == pytest.approx(-ratio / 2)
    # Each of three tokens has a third of the gradient of -s A / 2, whatever its own ratio.
    assert current.grad[0].tolist() == pytest.approx([-ratio / 6] * 3)
    assert current.grad[1].tolist() == [0, 0, 0]


def test_gspo_bounds_are_the_papers():
    current, old = _one(1.01)
    loss = gspo_loss(current=current, old=old, advantages=torch.tensor([1.0], dtype=torch.float64), responses=ONE)[0]
    assert loss.item() == pytest.approx(-1.0004)


def test_decoupled_loss_is_the_proximal_weight_times_the_clipped_ratio():
    current, proximal = _one(1.5)
    rollout = proximal - math.log(1.7)
    advantages = torch.tensor([2.0], dtype=torch.float64)
    assert decoupled_loss(log_ratios(proximal, rollout, ONE), current=current, advantages=advantages)[
        0
    ].item() == pytest.approx(-1.7 * 1.2 * 2)
    capped = decoupled_loss(
        log_ratios(proximal, proximal - math.log(3), ONE), current=current, advantages=advantages, cap=2.5
    )[0]
    assert capped.item() == pytest.approx(-2.5 * 1.2 * 2)
    # With the rollout as proximal policy it is GRPO on the rollout's ratio.
    same = decoupled_loss(log_ratios(rollout, rollout, ONE), current=current, advantages=advantages)[0]
    assert same.item() == grpo_loss(current=current, old=rollout, advantages=advantages, responses=ONE)[0].item()


def test_decoupled_loss_with_a_far_range_has_the_off_policy_gradient():
    """With nothing clipped, pi_prox / mu * pi_theta / pi_prox is pi_theta / mu: the proximal policy cancels."""
    torch.manual_seed(0)
    rollout = -torch.rand(2, 3, dtype=torch.float64) - 1
    current = (rollout + 0.3 * torch.randn(2, 3, dtype=torch.float64)).requires_grad_()
    proximal = rollout + 0.3 * torch.randn(2, 3, dtype=torch.float64)
    advantages = torch.randn(2, 3, dtype=torch.float64)
    decoupled_loss(
        log_ratios(proximal, rollout, TWO),
        current=current,
        advantages=advantages,
        clip_low=1,
        clip_high=1e9,
        cap=math.inf,
        aggregation="token-mean",
    )[0].backward()
    expected = -(current - rollout).exp() * advantages * TWO.mask / 4
    torch.testing.assert_close(current.grad, expected.detach())


def test_losses_take_the_weights_of_this_package():
    """A token far off the trainer's policy counts at most twice, and one outside its veto not at all."""
    current = torch.tensor([[-1.0, -1.0]])
    rollout = torch.tensor([[-1.0, -9.0]])
    responses = Responses.padded(torch.ones(1, 2))
    weights = truncated_importance_weights(log_ratios(current, rollout, responses))
    assert grpo_loss(current=current, old=current, advantages=torch.ones(1), responses=responses, weights=weights)[
        0
    ].item() == pytest.approx(-1.5)


def test_tensors_of_other_shapes_are_refused():
    with pytest.raises(InputError, match=r"advantages \[3\] must be \[1\], one for each sequence, or .* \[1, 1\]"):
        grpo_loss(current=-torch.ones(1, 1), old=-torch.ones(1, 1), advantages=torch.ones(3), responses=ONE)[0]
    with pytest.raises(InputError, match=r"weights \[1\] and the response mask \[1, 1\]"):
        grpo_loss(
            current=-torch.ones(1, 1),
            old=-torch.ones(1, 1),
            advantages=torch.ones(1),
            responses=ONE,
            weights=torch.ones(1),
        )[0]
