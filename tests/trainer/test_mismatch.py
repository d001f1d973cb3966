"""Metrics against closed forms on small distributions."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_router_replay.mismatch import compare_routes, divergence

P_ROLLOUT = (0.5, 0.25, 0.125, 0.125)
P_TRAINER = (0.25, 0.25, 0.25, 0.25)


def _sampled_exactly(copies: int = 1):
    """Tokens in the very proportions of the rollout's distribution: means over them are exact expectations."""
    counts = [int(8 * p) * copies for p in P_ROLLOUT]
    tokens = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    return (torch.tensor(p, dtype=torch.float64).log()[tokens] for p in (P_TRAINER, P_ROLLOUT))


def test_divergence_is_the_closed_form():
    trainer, rollout = _sampled_exactly()
    found = divergence(trainer, rollout, torch.ones(8, dtype=torch.bool), thresholds=(1.5, 1.99, 2.01))
    kl = sum(p * math.log(p / q) for p, q in zip(P_ROLLOUT, P_TRAINER, strict=True))
    assert kl == pytest.approx(0.25 * math.log(2))
    assert found.num_tokens == 8
    # On exact proportions E[r] = 1, so both estimators give KL itself.
    assert found.k1 == pytest.approx(kl, rel=1e-14)
    assert found.k3 == pytest.approx(kl, rel=1e-14)
    # r is 1/2 for 4 of 8 tokens, 2 for 2 of them, 1 for 2: both sides of 1 count.
    assert found.ratio_tails == {1.5: 0.75, 1.99: 0.75, 2.01: 0.0}


def test_estimators_differ_as_they_should_off_the_proportions():
    trainer, rollout = torch.tensor([-1.0, -3.0]), torch.tensor([-1.5, -2.0])
    found = divergence(trainer, rollout, torch.tensor([True, True]))
    assert found.k1 == pytest.approx(0.25)
    expected = ((math.exp(0.5) - 1 - 0.5) + (math.exp(-1.0) - 1 + 1.0)) / 2
    assert found.k3 == pytest.approx(expected, rel=1e-6)
    assert found.ratio_tails == {2.0: 0.5}


def test_masked_tokens_do_not_count():
    trainer, rollout = _sampled_exactly()
    padded = [torch.cat([value, torch.tensor([-1e9, float("nan")])]) for value in (trainer, rollout)]
    mask = torch.tensor([True] * 8 + [False] * 2)
    assert divergence(*padded, mask) == divergence(*(value[:8] for value in padded), mask[:8])


def test_k3_of_nearly_equal_probabilities_is_not_lost_to_rounding():
    trainer = torch.full((4,), -1.0, dtype=torch.float64)
    found = divergence(trainer + 1e-7, trainer, torch.ones(4, dtype=torch.bool))
    # x^2 / 2; exp(x) - 1 - x in float64 would be off by about eps / (x^2 / 2) = 4 %.
    assert found.k3 == pytest.approx(5e-15, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(2), torch.ones(3, dtype=torch.bool)), r"\[3\], rollout log-probs \[2\]"),
        ((torch.zeros(3), torch.zeros(3), torch.zeros(3, dtype=torch.bool)), "counts no token"),
        ((torch.zeros(1), torch.zeros(1), torch.ones(1, dtype=torch.bool), (1.0,)), "must be above 1"),
    ],
)
def test_divergence_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        divergence(*arguments)


TRAINER = torch.tensor([[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0, 1], [2, 3]], [[4, 5], [6, 7]]])
ROLLOUT = torch.tensor([[[1, 0], [3, 2]], [[0, 2], [2, 3]], [[0, 1], [4, 5]], [[0, 0], [0, 0]]])


def test_routes_are_compared_as_sets():
    found = compare_routes(TRAINER, ROLLOUT, valid=torch.tensor([True, True, True, False]))
    # Token 0 differs in order only, token 1 in one expert of layer 0, token 2 in both of layer 1.
    assert found.num_tokens == 3
    assert found.differing_routes == pytest.approx(2 / 6)
    assert found.differing_tokens == pytest.approx(2 / 3)
    assert found.overlap == pytest.approx((5 / 6, 4 / 6))


def test_all_tokens_count_by_default():
    assert compare_routes(TRAINER, TRAINER).overlap == (1.0, 1.0)
    assert compare_routes(TRAINER, ROLLOUT).num_tokens == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TRAINER, ROLLOUT[:, :1]), r"\[4, 2, 2\] and rollout routes \[4, 1, 2\]"),
        ((TRAINER, ROLLOUT, torch.ones(3, dtype=torch.bool)), r"valid \[3\] must have one entry for each of 4"),
        ((TRAINER, ROLLOUT, torch.zeros(4, dtype=torch.bool)), "no token has routes on both sides"),
    ],
)
def test_compare_routes_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare_routes(*arguments)
