"""What is computed for all packed tokens at once, against a loop over the responses, on ragged batches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from router_replay.mismatch import (
    LogRatios,
    Responses,
    doubly_robust_advantages,
    group_relative_advantages,
    metropolis_chain,
    optimal_token_baseline_advantages,
)
from tests.router_replay.mismatch import loops
from tests.router_replay.mismatch.loops import EPS, Packed


@st.composite
def packed(draw: st.DrawFn) -> tuple[Packed, torch.Generator]:
    """Sequences of 0 to 40 tokens, with and without response tokens, in few groups, and the seed of their values."""
    lengths = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 7, 40]), min_size=1, max_size=9))
    # As many tokens as sequences, that are not one each, are refused.
    assume(sum(lengths) != len(lengths) or set(lengths) == {1})
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    share = draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    mask = (torch.rand(sum(lengths), generator=generator) < share).tolist()
    groups = draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    return Packed(lengths, mask, groups), generator


def _responses(batch: Packed) -> Responses:
    bounds = torch.tensor([0, *batch.lengths]).cumsum(0)
    return Responses.packed(torch.tensor(batch.mask, dtype=torch.bool), bounds, batch.groups)


def _normal(batch: Packed, generator: torch.Generator, count: int) -> list[Tensor]:
    """Values of each token; what is no response token holds NaN."""
    given = torch.randn(count, len(batch.mask), generator=generator, dtype=torch.float64)
    return list(given.masked_fill(~torch.tensor(batch.mask, dtype=torch.bool), math.nan))


def _within(found: Tensor, expected: list[float], magnitude: list[float], roundings: int) -> None:
    assert found.dtype == torch.float64 and found.isfinite().all()
    off = (found - torch.tensor(expected, dtype=torch.float64)).abs()
    assert (off <= roundings * EPS * torch.tensor(magnitude, dtype=torch.float64)).all(), off.max()


@settings(deadline=None, max_examples=100)
@given(packed(), st.sampled_from([1.0, 0.9, 0.0]), st.sampled_from([0.1, 1.0, 1e3]))
def test_doubly_robust_values_are_those_of_the_loop(batch, discount, scale):
    batch, generator = batch
    rewards, values, weights, actions = _normal(batch, generator, 4)
    weights = scale * weights.abs()
    found = doubly_robust_advantages(
        rewards, values, weights, _responses(batch), action_values=actions, discount=discount
    )
    expected, advantages, magnitude = loops.doubly_robust(
        batch, *(each.tolist() for each in (rewards, values, weights, actions)), discount
    )
    # Four operations a token in the loop, and two more in the scan, of at most 40 tokens; some more at the ends.
    _within(found.values, expected, magnitude, 6 * 40 + 20)
    _within(found.advantages, advantages, magnitude, 6 * 40 + 20)


@settings(deadline=None, max_examples=100)
@given(packed(), st.booleans())
def test_the_token_baseline_is_that_of_the_loop(batch, weighted):
    batch, generator = batch
    rewards, logprobs, squares, weights = _normal(batch, generator, 4)
    # Of p between 0.05 and 0.95, so that no energy is a small difference of large numbers.
    p = 0.05 + 0.9 * logprobs.sigmoid()
    squares = p.square() + squares.abs()
    energies = (1 - p).square() + (squares - p.square())
    energies = energies * weights.square() if weighted else energies
    found = optimal_token_baseline_advantages(
        rewards, p.log(), squares, _responses(batch), weights=weights if weighted else None
    )
    expected, magnitude = loops.token_baseline(batch, rewards.tolist(), energies.tolist())
    # Energies are right to some eps over 0.0025, the least (1 - p)^2, and means of returns by them no worse; sums are
    # of at most 40 tokens and 9 responses.
    _within(found, expected, magnitude, 2 * 4 * 400 + 2 * 40 + 2 * 9 + 20)


@settings(deadline=None, max_examples=100)
@given(packed())
def test_rewards_of_responses_are_at_their_last_tokens(batch):
    batch, generator = batch
    values, weights = _normal(batch, generator, 2)
    rewards = torch.randn(len(batch.lengths), generator=generator, dtype=torch.float64)
    responses = _responses(batch)
    if len(batch.mask) == len(batch.lengths):
        return
    at_last = torch.zeros(len(batch.mask), dtype=torch.float64)
    for reward, places in zip(rewards, batch.responses(), strict=True):
        at_last[places[-1:]] = reward
    found, expected = (doubly_robust_advantages(each, values, weights, responses) for each in (rewards, at_last))
    assert found.values.equal(expected.values) and found.advantages.equal(expected.advantages)


@settings(deadline=None, max_examples=100)
@given(packed(), st.sampled_from(["token", "sequence"]))
def test_metropolis_chains_are_those_of_the_loop(batch, level):
    batch, generator = batch
    trainer, rollout = (-each.abs() for each in _normal(batch, generator, 2))
    trainer[torch.rand(len(trainer), generator=generator) < 0.1] = -math.inf
    responses = _responses(batch)
    ratios = LogRatios.of(trainer=trainer, rollout=rollout, responses=responses)
    number = len(batch.mask) if level == "token" else len(batch.lengths)
    uniforms = torch.rand(number, generator=generator, dtype=torch.float64)
    uniforms[torch.rand(number, generator=generator) < 0.1] = 0.0
    found = metropolis_chain(ratios, level=level, uniforms=uniforms)
    of_sequence = batch.responses()
    if level == "token":
        chain_of = [group for group, length in zip(batch.groups, batch.lengths, strict=True) for _ in range(length)]
        given_to = (ratios.token.tolist(), uniforms.tolist(), batch.mask, chain_of)
        expected = loops.chain(*given_to)
    else:
        steps = loops.chain(ratios.sequence.tolist(), uniforms.tolist(), list(map(bool, of_sequence)), batch.groups)
        expected = [0] * len(batch.mask)
        for places, count in zip(of_sequence, steps, strict=True):
            for place in places:
                expected[place] = count
    # The same comparisons of the same float64 numbers.
    assert found.multiplicity.tolist() == expected and found.accepted.tolist() == [each > 0 for each in expected]


@settings(deadline=None, max_examples=100)
@given(packed(), st.booleans())
def test_group_relative_advantages_are_those_of_the_loop(batch, divide):
    batch, generator = batch
    rewards = torch.randn(len(batch.lengths), generator=generator, dtype=torch.float64)
    found = group_relative_advantages(rewards, _responses(batch), divide_by_std=divide)
    for row, group in enumerate(batch.groups):
        others = [reward for reward, other in zip(rewards.tolist(), batch.groups, strict=True) if other == group]
        mean = math.fsum(others) / len(others)
        std = math.sqrt(math.fsum((each - mean) ** 2 for each in others) / max(len(others) - 1, 1))
        scale = std + 1e-6 if divide else 1.0
        # A mean of at most nine numbers of size 4, and its errors again in the deviation.
        assert found[row].item() == pytest.approx((rewards[row].item() - mean) / scale, abs=400 * EPS / scale)


def _uneven(long: int, short: int) -> tuple[Responses, torch.Generator]:
    lengths = [long] + [1] * short
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return Responses.packed(torch.ones(sum(lengths)), bounds, range(len(lengths))), torch.Generator().manual_seed(0)


def test_one_long_response_among_short_ones_costs_what_its_tokens_cost():
    """A rectangle of 4,001 sequences would have 131 million places; everything ever allocated is summed."""
    responses, generator = _uneven(32768, 4000)
    size = len(responses.mask)
    values, weights, logprobs = torch.rand(3, size, generator=generator)
    rewards = torch.rand(4001, generator=generator)
    ratios = LogRatios.of(trainer=-logprobs, rollout=-values, responses=responses)
    with torch.profiler.profile(profile_memory=True) as profile:
        doubly_robust_advantages(rewards, values, weights, responses)
        optimal_token_baseline_advantages(rewards, -logprobs, values, responses, weights=weights)
        group_relative_advantages(rewards, responses)
        metropolis_chain(ratios, level="token")
    # Some five hundred float64 numbers a token; the rectangle alone has 3,500.
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.events()) < 10_000 * size
