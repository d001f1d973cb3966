"""Self-normalised weights: their exact expectation over every set of n responses, and what they promise about a set."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from router_replay.errors import InputError
from router_replay.mismatch import Responses, self_normalized_weights
from tests.router_replay.mismatch.pairs import log_ratios
from tests.router_replay.mismatch.tiny_policies import batch, probability, random_policy, responses_of, table

LONGEST = 2
ROWS = responses_of(LONGEST)
MU, PI = random_policy(3, LONGEST, spread=0.5), random_policy(4, LONGEST, spread=0.5)
P_MU = [probability(MU, row) for row in ROWS]
P_PI = [probability(PI, row) for row in ROWS]
RHO = [pi / mu for mu, pi in zip(P_MU, P_PI, strict=True)]
F = [math.sin(3 * number) for number in range(len(ROWS))]
TARGET = math.fsum(p * f for p, f in zip(P_PI, F, strict=True))


def _expectation_over_sets(size: int) -> float:
    """E of mean(w f) over n independent responses: every n-tuple is a prompt's group of one batch."""
    tuples = list(itertools.product(range(len(ROWS)), repeat=size))
    rows = [ROWS[number] for each in tuples for number in each]
    groups = [at for at in range(len(tuples)) for _ in range(size)]
    weights = self_normalized_weights(
        log_ratios(table(PI, rows, LONGEST), table(MU, rows, LONGEST), batch(rows, LONGEST, groups)), over="group"
    )
    first = weights[:, 0].reshape(len(tuples), size).tolist()
    return (
        math.fsum(
            math.prod(P_MU[number] for number in each) * sum(w * F[number] for w, number in zip(ws, each, strict=True))
            for each, ws in zip(tuples, first, strict=True)
        )
        / size
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_expectation_over_sets_of_n_is_that_of_the_ratio_of_sums(size):
    expected = math.fsum(
        math.prod(P_MU[at] for at in each) * sum(RHO[at] * F[at] for at in each) / sum(RHO[at] for at in each)
        for each in itertools.product(range(len(ROWS)), repeat=size)
    )
    # Weights with a few eps of float64, averaged with probabilities.
    assert _expectation_over_sets(size) == pytest.approx(expected, abs=1e-13)


def test_the_bias_falls_as_one_over_n():
    """Bias = c / n + O(1/n^2), c = -E_mu[rho^2 (f - E_pi f)], the leading term of the delta method.

    Responses of one token: sets of n are counted by how often each of the three tokens occurs.
    """
    mu, pi, f = (0.5, 0.3, 0.2), (0.3, 0.3, 0.4), (1.0, -2.0, 4.0)
    target = math.fsum(p * value for p, value in zip(pi, f, strict=True))
    leading = -math.fsum(p**2 / q * (value - target) for p, q, value in zip(pi, mu, f, strict=True))
    bias = {}
    for size in (1, 2, 4, 8, 16, 32):
        counts = [(one, two, size - one - two) for one in range(size + 1) for two in range(size + 1 - one)]
        tokens = torch.cat([torch.repeat_interleave(torch.arange(3), torch.tensor(each)) for each in counts])
        trainer, rollout = (torch.tensor(law, dtype=torch.float64).log()[tokens, None] for law in (pi, mu))
        responses = Responses.padded(torch.ones(len(tokens), 1), torch.arange(len(counts)).repeat_interleave(size))
        weighted = self_normalized_weights(log_ratios(trainer, rollout, responses))[:, 0] * torch.tensor(f)[tokens]
        chance = [
            math.factorial(size) * math.prod(q**n / math.factorial(n) for q, n in zip(mu, each, strict=True))
            for each in counts
        ]
        means = weighted.reshape(-1, size).mean(-1).tolist()
        bias[size] = math.fsum(p * mean for p, mean in zip(chance, means, strict=True)) - target
    # One sample has weight 1: the mean under the rollout.
    assert bias[1] == pytest.approx(math.fsum(q * value for q, value in zip(mu, f, strict=True)) - target, abs=1e-13)
    # n times the bias nears c with an error that halves when n doubles, up to terms of order 1/n^2.
    off = [size * bias[size] - leading for size in (8, 16, 32)]
    assert abs(off[-1]) < 0.01 * abs(leading)
    assert 0.3 < off[1] / off[0] < off[2] / off[1] < 0.5


def test_exact_proportions_give_the_exact_expectation():
    """Consistency: 1, 2 and 5 of 8 responses, as the rollout's probabilities say."""
    tokens = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 2, 5]))
    mu = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64) / 8
    pi, f = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([3.0, -1.0, 7.0], dtype=torch.float64)
    weights = self_normalized_weights(
        log_ratios(pi.log()[tokens, None], mu.log()[tokens, None], Responses.padded(torch.ones(8, 1))), over="batch"
    )
    assert (weights[:, 0] * f[tokens]).mean().item() == pytest.approx((pi * f).sum().item(), abs=1e-14)


def _random(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, Responses, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    trainer, rollout = (-3 * torch.rand(9, 6, generator=generator, dtype=dtype) - 5 for _ in range(2))
    mask = torch.rand(9, 6, generator=generator) < 0.6
    mask[4] = False
    trainer[0, mask[0]] = -math.inf
    groups = [5, 2, 5, 9, 2, 9, 5, 2, 2]
    return trainer, rollout, Responses.padded(mask, groups), groups


@pytest.mark.parametrize("over", ["batch", "group"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_every_set_has_mean_one_and_weights_in_proportion_to_the_ratios(level, over):
    trainer, rollout, responses, groups = _random(0)
    weights = self_normalized_weights(log_ratios(trainer, rollout, responses), level=level, over=over)
    samples: dict[int, list[tuple[float, float]]] = {}
    for row, group in enumerate(groups):
        columns = responses.mask[row].nonzero().flatten().tolist()
        logs = [(trainer - rollout)[row, column].item() for column in columns]
        if level == "sequence":
            assert len({weights[row, column].item() for column in columns}) <= 1
            columns, logs = columns[:1], [math.fsum(logs)] * bool(columns)
        found = [(math.exp(log), weights[row, column].item()) for log, column in zip(logs, columns, strict=True)]
        samples.setdefault(group if over == "group" else 0, []).extend(found)
    assert len(samples) == (3 if over == "group" else 1)
    for each in samples.values():
        ratios, found = zip(*each, strict=True)
        mean = math.fsum(ratios) / len(ratios)
        # Logarithms up to 20 with an error of one eps each, over six tokens.
        assert found == pytest.approx([ratio / mean for ratio in ratios], rel=1e-13)
        assert math.fsum(found) == pytest.approx(len(found), rel=1e-13)
    assert (weights[~responses.mask] == 0).all()


def test_defaults_are_sequences_over_their_group():
    trainer, rollout, responses, _ = _random(1)
    expected = self_normalized_weights(log_ratios(trainer, rollout, responses), level="sequence", over="group")
    assert self_normalized_weights(log_ratios(trainer, rollout, responses)).equal(expected)


@pytest.mark.parametrize("over", ["batch", "group"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_constant_factor_in_the_ratios_changes_nothing(level, over):
    trainer, rollout, responses, _ = _random(2)
    one = responses.keep(responses.mask.cumsum(-1) == 1) if level == "sequence" else responses
    before = self_normalized_weights(log_ratios(trainer, rollout, one), level=level, over=over)
    after = self_normalized_weights(log_ratios(trainer - 700.25, rollout, one), level=level, over=over)
    # A logarithm of 700 has an error of 1.1e-13.
    torch.testing.assert_close(after, before, rtol=1e-12, atol=0)


def test_a_set_without_any_weight_has_weights_of_zero_and_no_nan():
    trainer = torch.tensor([[-math.inf], [-math.inf], [-1.0]])
    rollout = torch.full_like(trainer, -2.0)
    weights = self_normalized_weights(log_ratios(trainer, rollout, Responses.padded(torch.ones(3, 1), [0, 0, 1])))
    assert weights.tolist() == [[0.0], [0.0], [1.0]]


def test_no_weight_exceeds_the_size_of_its_set_however_far_ratios_lie_apart():
    trainer = torch.tensor([[-1.0], [-5000.0], [-9000.0]])
    weights = self_normalized_weights(
        log_ratios(trainer, torch.full_like(trainer, -4000.0), Responses.padded(torch.ones(3, 1), [0] * 3))
    )
    # log 3 in float64 and exp in float64, kept as float32: one rounding of 3.
    assert weights.flatten().tolist() == pytest.approx([3.0, 0.0, 0.0], rel=1.2e-7)


def test_groups_may_not_be_joined_over_ranks():
    trainer, rollout, responses, _ = _random(3)
    with pytest.raises(InputError, match="every prompt's group is on one rank"):
        self_normalized_weights(log_ratios(trainer, rollout, responses), over="group", process_group=object())
    with pytest.raises(InputError, match="level must be"):
        self_normalized_weights(log_ratios(trainer, rollout, responses), level="geometric")
