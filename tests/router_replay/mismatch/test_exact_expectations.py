"""Weights against expectations that are summed over every response of small policies.

The sums have at most 15 terms of size about 1, each from a few logarithms of size below 10 with an error of one float64
eps (2e-16) times their size: 1e-13 is some twenty times what can come together.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from router_replay.mismatch import (
    grpo_loss,
    icepop_weights,
    masked_importance_weights,
    truncated_importance_weights,
)
from tests.router_replay.mismatch.pairs import log_ratios
from tests.router_replay.mismatch.tiny_policies import batch, contexts, probability, random_policy, responses_of, table

LONGEST = 3
ROWS = responses_of(LONGEST)
MU, PI = random_policy(1, LONGEST), random_policy(2, LONGEST, spread=1.5)
P_MU = [probability(MU, row) for row in ROWS]
P_PI = [probability(PI, row) for row in ROWS]
RHO = [pi / mu for mu, pi in zip(P_MU, P_PI, strict=True)]
TRAINER, ROLLOUT = table(PI, ROWS, LONGEST), table(MU, ROWS, LONGEST)
RESPONSES = batch(ROWS, LONGEST)
# Any function of the whole response, and any of a token in its context.
F = [math.sin(3 * number) + 1 for number in range(len(ROWS))]
EXACT = 1e-13


def _g(prefix: tuple[int, ...]) -> float:
    return math.cos(2 + sum((token + 1) * 5**at for at, token in enumerate(prefix)))


def _of_responses(weights: torch.Tensor) -> list[float]:
    """One weight for each response, which all of its tokens must have."""
    for row, tokens in zip(weights.tolist(), ROWS, strict=True):
        assert row[: len(tokens)] == [row[0]] * len(tokens) and row[len(tokens) :] == [0.0] * (LONGEST - len(tokens))
    return weights[:, 0].tolist()


def _expectation(*factors: list[float]) -> float:
    return math.fsum(math.prod(each) for each in zip(P_MU, *factors, strict=True))


def _at_place(weights: torch.Tensor, place: int) -> float:
    """E_mu of weight times g at one place, over responses that reach it."""
    return math.fsum(
        mu * weights[number, place].item() * _g(row[: place + 1])
        for number, (mu, row) in enumerate(zip(P_MU, ROWS, strict=True))
        if len(row) > place
    )


def _over_contexts(place: int, law, weight=lambda ratio: ratio) -> float:
    """Sum over contexts x under `law` and tokens a under mu of weight(pi(a|x) / mu(a|x)) g(x, a)."""
    return math.fsum(
        probability(law, x) * MU[x][a] * weight(PI[x][a] / MU[x][a]) * _g((*x, a))
        for x in contexts(LONGEST)
        if len(x) == place
        for a in range(3)
    )


def test_the_policies_are_distributions_over_all_responses():
    assert len(ROWS) == len(set(ROWS)) == 15
    assert math.fsum(P_MU) == pytest.approx(1, abs=EXACT) and math.fsum(P_PI) == pytest.approx(1, abs=EXACT)
    assert max(RHO) > 4 and min(RHO) < 0.25


def test_importance_weights_of_sequences_are_unbiased():
    weights = truncated_importance_weights(log_ratios(TRAINER, ROLLOUT, RESPONSES), level="sequence", cap=math.inf)
    target = math.fsum(p * f for p, f in zip(P_PI, F, strict=True))
    assert _expectation(_of_responses(weights), F) == pytest.approx(target, abs=EXACT)
    assert _expectation(F) != pytest.approx(target, abs=0.01)


def test_the_weighted_policy_gradient_is_the_gradient_of_the_trainers_expectation():
    """Through the loss: current = old, every row an expectation's term, and the sum over tokens."""
    free = {x: torch.tensor(row, dtype=torch.float64).log().requires_grad_() for x, row in PI.items()}
    rows = [[free[row[:at]].log_softmax(-1)[token] for at, token in enumerate(row)] for row in ROWS]
    current = torch.stack([torch.stack(row + [row[0] * 0] * (LONGEST - len(row))) for row in rows])
    weights = truncated_importance_weights(log_ratios(TRAINER, ROLLOUT, RESPONSES), level="sequence", cap=math.inf)
    share = torch.tensor(P_MU, dtype=torch.float64)
    advantages = share * torch.tensor(F, dtype=torch.float64)
    loss = grpo_loss(
        current=current,
        old=TRAINER,
        advantages=advantages,
        responses=RESPONSES,
        weights=weights,
        aggregation="token-mean",
        denominator=1,
    )[0]
    found = torch.autograd.grad(-loss, list(free.values()), retain_graph=True)
    value = sum(f * torch.stack(row).sum().exp() for f, row in zip(F, rows, strict=True))
    expected = torch.autograd.grad(value, list(free.values()))
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("cap", [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 64.0])
def test_truncated_weights_of_sequences_have_the_closed_forms_bias(cap):
    weights = _of_responses(
        truncated_importance_weights(log_ratios(TRAINER, ROLLOUT, RESPONSES), level="sequence", cap=cap)
    )
    truncated = math.fsum(mu * min(rho, cap) * f for mu, rho, f in zip(P_MU, RHO, F, strict=True))
    lost = math.fsum(max(pi - cap * mu, 0) * f for mu, pi, f in zip(P_MU, P_PI, F, strict=True))
    target = math.fsum(p * f for p, f in zip(P_PI, F, strict=True))
    assert _expectation(weights, F) == pytest.approx(truncated, abs=EXACT)
    assert target - _expectation(weights, F) == pytest.approx(lost, abs=EXACT)


def test_truncated_weights_lose_their_bias_as_the_cap_grows():
    target = math.fsum(p * f for p, f in zip(P_PI, F, strict=True))
    biases = []
    for cap in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 64.0):
        weights = truncated_importance_weights(log_ratios(TRAINER, ROLLOUT, RESPONSES), level="sequence", cap=cap)
        biases.append(target - _expectation(_of_responses(weights), F))
    # F is not negative: what the cap takes away is only ever added back.
    assert all(wider < narrower for narrower, wider in itertools.pairwise(biases[:5]))
    assert biases[0] > 0.5 and max(RHO) < 64 and biases[-1] == pytest.approx(0, abs=EXACT)


@pytest.mark.parametrize("place", range(LONGEST))
def test_weights_of_tokens_keep_the_rollouts_contexts(place):
    weights = truncated_importance_weights(log_ratios(TRAINER, ROLLOUT, RESPONSES), cap=math.inf)
    found = _at_place(weights, place)
    # Sum over contexts under mu, tokens under pi.
    assert found == pytest.approx(_over_contexts(place, MU), abs=EXACT)
    if place:
        assert found != pytest.approx(_over_contexts(place, PI), abs=1e-3)
    capped = truncated_importance_weights(log_ratios(TRAINER, ROLLOUT, RESPONSES), cap=1.5)
    expected = _over_contexts(place, MU, lambda ratio: min(ratio, 1.5))
    assert _at_place(capped, place) == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize(("lower", "upper"), [(0.5, 2.0), (0.0, 1.0), (0.9, math.inf)])
def test_masked_weights_are_the_sum_over_what_is_kept(lower, upper):
    weights = masked_importance_weights(
        log_ratios(TRAINER, ROLLOUT, RESPONSES), level="sequence", lower=lower, upper=upper
    )
    kept = [lower <= rho <= upper for rho in RHO]
    assert 0 < sum(kept) < len(ROWS)
    expected = math.fsum(pi * f for pi, f, keep in zip(P_PI, F, kept, strict=True) if keep)
    assert _expectation(_of_responses(weights), F) == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("place", range(LONGEST))
@pytest.mark.parametrize("bounds", [{}, {"lower": 0.8, "upper": 1.3}])
def test_icepop_is_the_sum_over_kept_tokens_in_the_rollouts_contexts(place, bounds):
    low, high = bounds.get("lower", 0.5), bounds.get("upper", 5.0)
    expected = _over_contexts(place, MU, lambda ratio: ratio if low <= ratio <= high else 0.0)
    found = _at_place(icepop_weights(log_ratios(TRAINER, ROLLOUT, RESPONSES), **bounds), place)
    assert found == pytest.approx(expected, abs=EXACT)


def test_default_bounds_are_those_of_the_docstrings():
    """TIS is capped at 2, MIS keeps [1/2, 2], IcePop [1/2, 5]; bounds are part of what is kept."""
    ratios = torch.tensor([[0.49, 0.51, 1.9, 2.1, 4.9, 5.1]], dtype=torch.float64)
    rollout = torch.full_like(ratios, -3.0)
    given = (rollout + ratios.log(), rollout, batch([(0,) * 6], 6))
    # exp(log(x) - 3 + 3): a few eps of float64.
    assert truncated_importance_weights(log_ratios(*given))[0].tolist() == pytest.approx(
        [0.49, 0.51, 1.9, 2, 2, 2], rel=1e-14
    )
    assert masked_importance_weights(log_ratios(*given))[0].tolist() == pytest.approx(
        [0, 0.51, 1.9, 0, 0, 0], rel=1e-14
    )
    assert icepop_weights(log_ratios(*given))[0].tolist() == pytest.approx([0, 0.51, 1.9, 2.1, 4.9, 0], rel=1e-14)
    on_bounds = torch.tensor([[math.log(0.5), math.log(2.0)]], dtype=torch.float64) - 1
    # The difference is exact: both bounds' logarithms minus 1 plus 1 are 1 ulp off at most, so compare with wider ones.
    one = (on_bounds, torch.full_like(on_bounds, -1.0), batch([(0, 0)], 2))
    assert (
        masked_importance_weights(log_ratios(*one), lower=0.5 * (1 - 1e-15), upper=2 * (1 + 1e-15)).count_nonzero() == 2
    )
    assert (
        masked_importance_weights(log_ratios(*one), lower=0.5 * (1 + 1e-14), upper=2 * (1 - 1e-14)).count_nonzero() == 0
    )
    exact = (torch.zeros(1, 1) - 1, torch.zeros(1, 1) - 1, batch([(0,)], 1))
    assert masked_importance_weights(log_ratios(*exact), lower=1.0, upper=1.0).tolist() == [[1.0]]


@pytest.mark.parametrize("cap", [1.25, math.inf])
def test_geometric_weights_are_the_roots_of_the_ratios(cap):
    roots = [rho ** (1 / len(row)) for rho, row in zip(RHO, ROWS, strict=True)]
    truncated = truncated_importance_weights(log_ratios(TRAINER, ROLLOUT, RESPONSES), level="geometric", cap=cap)
    expected = math.fsum(mu * min(root, cap) * f for mu, root, f in zip(P_MU, roots, F, strict=True))
    assert _expectation(_of_responses(truncated), F) == pytest.approx(expected, abs=EXACT)
    masked = masked_importance_weights(log_ratios(TRAINER, ROLLOUT, RESPONSES), level="geometric", lower=0.8, upper=cap)
    kept = math.fsum(mu * root * f for mu, root, f in zip(P_MU, roots, F, strict=True) if 0.8 <= root <= cap)
    assert _expectation(_of_responses(masked), F) == pytest.approx(kept, abs=EXACT)
