"""Advantages relative to the group and with the optimal token baseline, against sums written out in plain Python."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from router_replay.errors import InputError
from router_replay.mismatch import Responses, group_relative_advantages, optimal_token_baseline_advantages
from tests.router_replay.mismatch.tiny_policies import random_policy


@pytest.mark.parametrize("divide", [True, False])
def test_group_relative_advantages_are_standard_scores(divide):
    rewards, groups = [1.0, 0.0, 0.5, 2.0, 2.0, 9.0, 0.25], [4, 4, 1, 4, 1, 7, 1]
    responses = Responses.padded(torch.ones(7, 2), groups)
    found = group_relative_advantages(torch.tensor(rewards, dtype=torch.float64), responses, divide_by_std=divide)
    for row, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        others = [each for each, other in zip(rewards, groups, strict=True) if other == group]
        std = statistics.stdev(others) if len(others) > 1 else 0.0
        scale = std + 1e-6 if divide else 1.0
        # A handful of roundings of numbers near 1.
        assert found[row].item() == pytest.approx((reward - statistics.fmean(others)) / scale, abs=1e-14)
    by_default = group_relative_advantages(torch.tensor(rewards, dtype=torch.float64), responses)
    assert by_default.equal(found) is divide
    assert group_relative_advantages(torch.tensor([1, 0] * 3 + [0]), responses).dtype == torch.float32


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.7, 0.1, 33.3, 1000.7])
def test_equal_rewards_give_no_advantage(reward):
    """Rounding of their mean must not be divided by a standard deviation that is rounding, too."""
    for size in range(1, 33):
        found = group_relative_advantages(
            torch.full((size,), reward), Responses.padded(torch.ones(size, 1), [0] * size)
        )
        assert found.tolist() == [0.0] * size


def _reference(rewards, probabilities, squares, weights, mask, groups) -> list[list[float]]:
    """B_t = sum_i W_it G_it / sum_i W_it over responses that have a t-th token; a lone one has none."""
    chains = []
    for row, kept in enumerate(mask):
        columns = [at for at, keep in enumerate(kept) if keep]
        energies = [weights[row][at] ** 2 * (1 - 2 * probabilities[row][at] + squares[row][at]) for at in columns]
        chains.append(
            [
                (column, math.fsum(rewards[row][at] for at in columns[number:]), math.fsum(energies[: number + 1]))
                for number, column in enumerate(columns)
            ]
        )
    found = [[0.0] * len(kept) for kept in mask]
    for row, chain in enumerate(chains):
        for number, (column, gain, _) in enumerate(chain):
            there = [
                other[number]
                for other, group in zip(chains, groups, strict=True)
                if group == groups[row] and len(other) > number
            ]
            energy = math.fsum(each[2] for each in there)
            baseline = math.fsum(each[1] * each[2] for each in there) / energy if len(there) > 1 and energy else 0.0
            found[row][column] = gain - baseline
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_token_baseline_is_its_definition_with_holes_and_interleaved_groups(seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, logprobs, squares, weights = torch.rand(4, 8, 6, generator=generator, dtype=torch.float64)
    logprobs, squares = -logprobs - 0.1, (-2 * logprobs - 0.2).exp() + 0.3 * squares
    mask = torch.rand(8, 6, generator=generator) < 0.6
    mask[6] = False
    groups = [2, 0, 2, 2, 0, 5, 0, 2]
    expected = _reference(*(each.tolist() for each in (rewards, logprobs.exp(), squares, weights, mask)), groups)
    # What is no response token may hold anything.
    given = [each.masked_fill(~mask, math.nan) for each in (rewards, logprobs, squares, weights)]
    responses = Responses.padded(mask, groups)
    found = optimal_token_baseline_advantages(*given[:3], responses, weights=given[3])
    # Energies are at least 0.01 and returns below 6: some hundred roundings of 1e-16.
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    packed = Responses.packed(mask.flatten(), range(0, 49, 6), groups)
    flat = optimal_token_baseline_advantages(*(g.flatten() for g in given[:3]), packed, weights=given[3].flatten())
    assert flat.view(8, 6).equal(found)
    assert not optimal_token_baseline_advantages(*(g.requires_grad_() for g in given[:3]), responses).requires_grad


def test_the_energy_is_the_squared_norm_of_the_gradient_with_respect_to_the_logits():
    """Read off from a group of two: with returns 0 and 1 the baseline is the second's share of the energy."""
    policy = random_policy(0, 1, spread=2.0)[()]
    norms, logprobs = [], []
    for token in (0, 1):
        logits = torch.tensor(policy, dtype=torch.float64).log().requires_grad_()
        logprob = logits.log_softmax(-1)[token]
        norms.append(torch.autograd.grad(logprob, logits)[0].square().sum().item())
        logprobs.append([logprob.item()])
    squares = torch.full((2, 1), math.fsum(p * p for p in policy), dtype=torch.float64)
    found = optimal_token_baseline_advantages(
        torch.tensor([0.0, 1.0]),
        torch.tensor(logprobs, dtype=torch.float64),
        squares,
        Responses.padded(torch.ones(2, 1), [0, 0]),
    )
    # Norms of size 0.1 and more from numbers with an error of a few eps.
    assert -found[0, 0].item() == pytest.approx(norms[1] / sum(norms), abs=1e-13)
    assert norms[0] != pytest.approx(norms[1], rel=0.1)


def test_tokens_of_probability_one_have_no_baseline():
    ones = torch.ones(2, 1)
    found = optimal_token_baseline_advantages(
        torch.tensor([1.0, 3.0]), ones.log(), ones, Responses.padded(ones, [0, 0])
    )
    assert found.flatten().tolist() == [1.0, 3.0]


def test_the_baseline_is_an_average_however_energies_are_rounded():
    """Nearly certain tokens, whose 1 - 2 p + sum p^2 in float32 is rounding, and may be below 0.

    sum p^2 by logarithms, as verl's `calculate_sum_pi_squared_from_logits` has it. An average lies between the least
    and the largest return, whatever non-negative energies are its weights.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 8, generator=generator)
    logits[:, 0] += 14 + torch.rand(2000, generator=generator)
    squares = (torch.logsumexp(2 * logits, -1) - 2 * torch.logsumexp(logits, -1)).exp()
    rewards = torch.tensor([1.0, 0.0]).repeat(1000)
    responses = Responses.padded(torch.ones(2000, 1), torch.arange(1000).repeat_interleave(2))
    advantages = optimal_token_baseline_advantages(rewards, logits.log_softmax(-1)[:, :1], squares[:, None], responses)
    baselines = rewards - advantages[:, 0]
    # One rounding of a quotient of numbers up to 1.
    assert baselines.min() >= -1e-6 and baselines.max() <= 1 + 1e-6


def test_rewards_by_response_count_at_their_last_token():
    generator = torch.Generator().manual_seed(0)
    logprobs, squares = -torch.rand(3, 4, generator=generator) - 0.1, torch.rand(3, 4, generator=generator)
    mask = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    responses = Responses.padded(mask, [0, 0, 0])
    at_the_end = torch.zeros(3, 4)
    at_the_end[0, 3], at_the_end[1, 2] = 2.0, -1.0
    found = optimal_token_baseline_advantages(torch.tensor([2.0, -1.0, 5.0]), logprobs, squares, responses)
    assert found.equal(optimal_token_baseline_advantages(at_the_end, logprobs, squares, responses))
    with pytest.raises(InputError, match=r"rewards \[2\] must be \[3\]"):
        optimal_token_baseline_advantages(torch.ones(2), logprobs, squares, responses)
    with pytest.raises(InputError, match="rewards"):
        group_relative_advantages(torch.ones(3, 4), responses)
