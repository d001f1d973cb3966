"""Metropolis chains against the exact transition matrix of the independence sampler.

What a chain does is a step function of its uniform numbers, with steps at the acceptance probabilities. One number
from the middle of each interval between them, weighted with its length, is therefore an exact integral. The middles
are at least 0.005 from a step, float32 rounding (6e-8) cannot move them across; weights are summed in float64.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch import Responses, metropolis_chain
from tests.router_replay.mismatch.pairs import log_ratios

# The last state is one that the trainer never takes.
MU = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
PI = torch.tensor([0.15, 0.6, 0.25, 0.0], dtype=torch.float64)
STATES = range(4)


def _acceptance() -> Tensor:
    """alpha(x, y) = min(1, pi(y) mu(x) / (pi(x) mu(y))), 1 from where pi is 0."""
    there, back = PI[:, None] * MU[None], PI[None] * MU[:, None]
    return torch.where(there > 0, (back / there.clamp(min=1e-300)).clamp(max=1), 1.0)


def _transitions() -> Tensor:
    moves = MU[None] * _acceptance()
    return moves + torch.diag(1 - moves.sum(-1))


def _cells() -> tuple[Tensor, Tensor]:
    """Middles and lengths of the intervals of [0, 1) on which no acceptance changes."""
    edges = torch.cat([torch.zeros(1), _acceptance().flatten(), torch.ones(1)]).double().unique()
    # Equal acceptances that rounding tells apart.
    edges = edges[torch.cat([torch.tensor([True]), edges.diff() > 1e-9])]
    assert edges.diff().min() > 0.01
    return (edges[1:] + edges[:-1]) / 2, edges.diff()


def _all_chains(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every chain of `size` samples: proposals and multiplicities `[chains, size]`, and its probability."""
    middles, lengths = _cells()
    proposals = torch.tensor(list(itertools.product(STATES, repeat=size)))
    cells = list(itertools.product(range(len(middles)), repeat=size - 1))
    cells = torch.tensor(cells, dtype=torch.int64).reshape(len(cells), size - 1)
    pairs = torch.cartesian_prod(torch.arange(len(proposals)), torch.arange(len(cells)))
    proposed, cell = proposals[pairs[:, 0]], cells[pairs[:, 1]]
    chance = MU[proposed].prod(-1) * lengths[cell].prod(-1)
    # The first number decides nothing: whatever it is, the chain starts at its first sample.
    uniforms = torch.cat([torch.full((len(pairs), 1), 0.999), middles[cell].float()], 1)
    # Samples of all chains in turn, so that groups are interleaved.
    chains = torch.arange(len(pairs)).repeat(size)
    tokens = proposed.T.flatten()
    found = metropolis_chain(
        log_ratios(
            PI.log()[tokens, None], MU.log()[tokens, None], Responses.padded(torch.ones(len(tokens), 1), chains)
        ),
        uniforms=uniforms.T.flatten(),
    )
    assert found.accepted.equal(found.multiplicity > 0) and found.multiplicity.dtype == torch.float32
    return proposed, found.multiplicity.reshape(size, -1).T.double(), chance


def test_the_matrix_has_the_trainer_as_its_stationary_law_in_detailed_balance():
    transitions = _transitions()
    assert torch.allclose(transitions.sum(-1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(PI @ transitions, PI, rtol=0, atol=1e-15)
    flow = PI[:, None] * transitions
    torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-16)
    torch.testing.assert_close(MU @ torch.linalg.matrix_power(transitions, 200), PI, rtol=0, atol=1e-13)


def test_a_step_of_the_chain_is_the_matrix():
    proposed, multiplicity, chance = _all_chains(2)
    assert chance.sum().item() == pytest.approx(1, abs=1e-14)
    # It moved if the second sample was accepted.
    state = torch.where(multiplicity[:, 1] > 0, proposed[:, 1], proposed[:, 0])
    found = torch.zeros(16, dtype=torch.float64).index_add_(0, proposed[:, 0] * 4 + state, chance).view(4, 4)
    torch.testing.assert_close(found / MU[:, None], _transitions(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_multiplicities_have_the_laws_of_all_steps(size):
    """Expected steps at y: sum over k < n of (mu P^k)(y); they sum to n in every chain."""
    proposed, multiplicity, chance = _all_chains(size)
    assert (multiplicity.sum(-1) == size).all() and (multiplicity == multiplicity.round()).all()
    found = torch.zeros(4, dtype=torch.float64)
    found.index_add_(0, proposed.flatten(), (multiplicity * chance[:, None]).flatten())
    law, expected = MU, torch.zeros_like(MU)
    for _ in range(size):
        expected, law = expected + law, law @ _transitions()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_the_law_of_accepted_samples_is_the_docstrings():
    """Expected acceptances at y: mu(y), then sum_x (mu P^k)(x) mu(y) alpha(x, y), which nears pi(y) P(accept at y)."""
    size = 4
    proposed, multiplicity, chance = _all_chains(size)
    found = torch.zeros(4, dtype=torch.float64)
    found.index_add_(0, proposed.flatten(), ((multiplicity > 0) * chance[:, None]).flatten())
    law, expected = MU, MU.clone()
    for _ in range(size - 1):
        expected, law = expected + (law[:, None] * MU[None] * _acceptance()).sum(0), law @ _transitions()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    accepts = (MU[None] * _acceptance()).sum(-1)
    stationary = (PI[:, None] * MU[None] * _acceptance()).sum(0)
    torch.testing.assert_close(stationary, PI * accepts, rtol=0, atol=1e-15)
    # Another law than the trainer's.
    assert (stationary / stationary.sum() - PI).abs().max() > 0.05


@pytest.mark.parametrize(("old", "new"), list(itertools.product(range(3), range(3))))
def test_acceptance_flips_at_the_ratio_of_ratios(old, new):
    threshold = _acceptance()[old, new].item()
    tokens = torch.tensor([old, new])
    given = (PI.log()[tokens, None], MU.log()[tokens, None], Responses.padded(torch.ones(2, 1), [0, 0]))
    # Logarithms of float32 numbers are off by an eps of 1.2e-7 or two: 1e-6 on either side is clear of it.
    below, above = threshold * (1 - 1e-6), threshold * (1 + 1e-6)
    assert metropolis_chain(log_ratios(*given), uniforms=torch.tensor([0.0, below])).accepted.flatten().tolist() == [
        True,
        True,
    ]
    if threshold < 1:
        found = metropolis_chain(log_ratios(*given), uniforms=torch.tensor([0.0, above]))
        assert found.multiplicity.flatten().tolist() == [2.0, 0.0]


def _one_chain(trainer: list[float], uniforms: list[float]) -> list[float]:
    given = torch.tensor(trainer)[:, None]
    responses = Responses.padded(torch.ones_like(given), [0] * len(given))
    found = metropolis_chain(
        log_ratios(given, torch.full_like(given, -1.0), responses), uniforms=torch.tensor(uniforms)
    )
    return found.multiplicity.flatten().tolist()


def test_ratios_of_zero_are_left_and_never_entered():
    nothing = -math.inf
    assert _one_chain([nothing, -1.0, nothing, -1.0], [0.5, 0.999, 0.0, 0.5]) == [1, 2, 0, 1]
    assert _one_chain([-1.0, nothing], [0.5, 0.0]) == [2, 0]
    assert _one_chain([nothing, nothing, nothing], [0.5, 0.999, 0.999]) == [1, 1, 1]
    assert _one_chain([nothing], [0.999]) == [1]
    # A ratio of exp(-200) is not 0: it is entered with a uniform number of 0 only, and left at once.
    assert _one_chain([-1.0, -201.0, -1.0], [0.5, 0.0, 0.999]) == [1, 1, 1]


def _interleaved() -> tuple[Tensor, Tensor, Tensor, list[int]]:
    generator = torch.Generator().manual_seed(0)
    trainer, rollout = (-4 * torch.rand(10, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(10, 5, generator=generator) < 0.6
    mask[3], mask[5] = False, False
    # Group 4 has one sample, group 6 none that has tokens.
    return trainer.masked_fill(~mask, math.nan), rollout, mask, [7, 1, 7, 6, 1, 7, 7, 4, 1, 7]


def _reference(log_rho: list[float], uniforms: list[float]) -> list[int]:
    """The chain as its definition says, in float64 and with probabilities, not logarithms."""
    steps, at = [0] * len(log_rho), 0
    for number, (log, uniform) in enumerate(zip(log_rho, uniforms, strict=True)):
        if number == 0 or uniform < min(1.0, math.exp(log - log_rho[at])):
            at = number
        steps[at] += 1
    return steps


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_every_prompt_has_a_chain_of_its_own_over_what_it_proposes(level):
    trainer, rollout, mask, groups = _interleaved()
    responses = Responses.padded(mask, groups)
    uniforms = torch.rand((10,) if level == "sequence" else (10, 5), generator=torch.Generator().manual_seed(1))
    found = metropolis_chain(log_ratios(trainer, rollout, responses), level=level, uniforms=uniforms)
    ratio = (trainer - rollout).masked_fill(~mask, 0)
    expected = torch.zeros(10, 5)
    for group in set(groups):
        rows = [row for row in range(10) if groups[row] == group and mask[row].any()]
        if level == "sequence":
            steps = _reference([ratio[row].sum().item() for row in rows], uniforms[rows].tolist()) if rows else []
            for row, number in zip(rows, steps, strict=True):
                expected[row, mask[row]] = number
        else:
            places = [tuple(place) for place in mask.nonzero().tolist() if place[0] in rows]
            logs, numbers = ([values[place].item() for place in places] for values in (ratio, uniforms))
            for place, number in zip(places, _reference(logs, numbers) if places else [], strict=True):
                expected[place] = number
    assert found.multiplicity.equal(expected) and found.accepted.equal(expected > 0)
    # Another order of the groups, each with its own samples and numbers in their order: the same chains.
    order = sorted(range(10), key=lambda row: groups[row])
    permuted = metropolis_chain(
        log_ratios(trainer[order], rollout[order], Responses.padded(mask[order], [groups[row] for row in order])),
        level=level,
        uniforms=uniforms[order],
    )
    assert permuted.multiplicity.equal(found.multiplicity[order])


def test_the_default_is_a_chain_of_sequences():
    trainer, rollout, mask, groups = _interleaved()
    found, explicit = (
        metropolis_chain(
            log_ratios(trainer, rollout, Responses.padded(mask, groups)), uniforms=torch.full((10,), 0.5), **level
        )
        for level in ({}, {"level": "sequence"})
    )
    assert found.multiplicity.equal(explicit.multiplicity)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_equal_seeds_give_equal_chains_and_others_do_not(level):
    responses = Responses.padded(torch.ones(200, 2), [row % 7 for row in range(200)])
    generator = torch.Generator().manual_seed(2)
    trainer, rollout = (-2 * torch.rand(200, 2, generator=generator) for _ in range(2))
    first, again, other = (
        metropolis_chain(
            log_ratios(trainer, rollout, responses), level=level, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (5, 5, 6)
    )
    assert first.multiplicity.equal(again.multiplicity) and not first.multiplicity.equal(other.multiplicity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_uniform_numbers_of_any_float_type_will_do(level, dtype):
    uniforms = torch.full((2,) if level == "sequence" else (2, 1), 0.5, dtype=dtype)
    given = torch.full((2, 1), -1.0)
    found = metropolis_chain(
        log_ratios(given, given, Responses.padded(torch.ones(2, 1), [0, 0])), level=level, uniforms=uniforms
    )
    assert found.multiplicity.dtype == torch.float32 and found.multiplicity.flatten().tolist() == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uniforms": torch.tensor([0.5, 1.0])}, r"in \[0, 1\)"),
        ({"uniforms": torch.tensor([-0.1, 0.5])}, r"in \[0, 1\)"),
        ({"uniforms": torch.tensor([math.nan, 0.5])}, r"in \[0, 1\)"),
        ({"uniforms": torch.rand(2, 3)}, r"must be \[2\]"),
        ({"uniforms": torch.rand(2), "level": "token"}, r"must be \[2, 3\]"),
        ({"level": "geometric"}, "level must be"),
    ],
)
def test_a_chain_refuses(options, message):
    with pytest.raises(InputError, match=message):
        metropolis_chain(
            log_ratios(-torch.ones(2, 3), -torch.ones(2, 3), Responses.padded(torch.ones(2, 3), [0, 0])), **options
        )
