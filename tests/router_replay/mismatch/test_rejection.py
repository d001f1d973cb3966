"""Masks against what they say of every sequence, computed token by token from probabilities in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch import (
    Responses,
    catastrophic_token_veto,
    exact_trust_region_mask,
    off_policy_sequence_mask,
    trust_region_mask,
)
from router_replay.mismatch.corrections import rejection as subject
from tests.router_replay.mismatch.pairs import log_ratios
from tests.router_replay.mismatch.tiny_policies import batch, contexts, random_policy, responses_of, table


def _ratios(rows: list[list[float]]) -> tuple[Tensor, Tensor, Responses]:
    """Given ratios of probabilities, None-padded to the longest; what is past a row's end is NaN."""
    width = max(map(len, rows))
    logs = [[math.log(r) if r else -math.inf for r in row] + [math.nan] * (width - len(row)) for row in rows]
    trainer = torch.tensor(logs, dtype=torch.float64) - 16
    return trainer, torch.full_like(trainer, -16.0).masked_fill(trainer.isnan(), math.nan), batch(rows, width)


def _rows(mask: Tensor, responses: Responses) -> list[bool]:
    """Whether each sequence is kept: wholly or not at all, and nothing outside of responses."""
    assert mask.dtype == torch.bool and not mask.requires_grad and not (mask & ~responses.mask).any()
    kept = [set(mask[row][responses.mask[row]].tolist()) for row in range(len(mask))]
    assert all(len(each) <= 1 for each in kept)
    return [each == {True} for each in kept]


def test_the_veto_looks_at_small_ratios_only():
    rows = [[1.0, 1.1e-4], [1.0, 0.9e-4, 1.0], [1e6, 1.0], [0.0], [], [0.5, 0.5]]
    given = _ratios(rows)
    assert _rows(catastrophic_token_veto(log_ratios(*given)), given[2]) == [True, False, True, False, False, True]
    assert _rows(catastrophic_token_veto(log_ratios(*given), threshold=0.7), given[2]) == [
        False,
        False,
        True,
        False,
        False,
        False,
    ]
    for threshold in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(InputError, match="threshold"):
            catastrophic_token_veto(log_ratios(*given), threshold=threshold)


def test_a_ratio_on_the_vetos_threshold_is_kept():
    """2^-k and its logarithm in float64: log(1) - k log 2 against the threshold's own logarithm."""
    trainer = torch.tensor([[-math.log(8)]], dtype=torch.float64)
    one = Responses.padded(torch.ones(1, 1))
    assert catastrophic_token_veto(log_ratios(trainer, torch.zeros(1, 1).double(), one), threshold=1 / 8).item()


def test_off_policy_sequences_are_dropped_where_the_advantage_is_negative():
    """Mean log(mu / pi) of the rows: 0.11, 0.09, -1, infinite, and none."""
    rows = [[math.exp(-0.02), math.exp(-0.2)], [math.exp(-0.09)], [math.e, math.e], [1.0, 0.0], []]
    given = _ratios(rows)
    for sign, kept in ((-1.0, [False, True, True, False, False]), (1.0, [True, True, True, True, False])):
        mask = off_policy_sequence_mask(log_ratios(*given[:2], given[2]), torch.full((5,), sign))
        assert _rows(mask, given[2]) == kept
    # An advantage of 0 has nothing to teach either way and stays.
    mask = off_policy_sequence_mask(log_ratios(*given[:2], given[2]), torch.zeros(5))
    assert _rows(mask, given[2]) == [True, True, True, True, False]
    wider = off_policy_sequence_mask(log_ratios(*given[:2], given[2]), -torch.ones(5), max_kl=0.12)
    assert _rows(wider, given[2]) == [True, True, True, False, False]


def test_off_policy_masking_is_per_token_where_advantages_are():
    rows = [[math.exp(-0.1), math.exp(-0.3)], [math.exp(-0.05)], [1.0, 0.0]]
    trainer, rollout, responses = _ratios(rows)
    advantages = torch.tensor([[1.0, -1.0], [-1.0, math.nan], [-1.0, 1.0]])
    mask = off_policy_sequence_mask(log_ratios(trainer, rollout, responses), advantages)
    assert mask.tolist() == [[True, False], [True, False], [False, True]]
    with pytest.raises(InputError, match="advantages"):
        off_policy_sequence_mask(log_ratios(trainer, rollout, responses), torch.ones(2))


@pytest.mark.parametrize("bounds", [{}, {"max_k2": 0.02, "mean_k3": None}, {"max_k2": None, "mean_k3": 0.02}])
def test_the_sampled_trust_region_bounds_the_largest_k2_and_the_mean_k3(bounds):
    rows = [
        [1.5, 1.0, 1.0] + [1.0] * 20,
        [1 / 1.5, 1.0, 1.0] + [1.0] * 20,
        [1.6] + [1.0] * 30,
        [1 / 1.6] + [1.0] * 30,
        [1.17, 1 / 1.17],
        [1.1] * 3,
        [0.0, 1.0],
        [],
    ]
    given = _ratios(rows)
    max_k2, mean_k3 = bounds.get("max_k2", 0.1), bounds.get("mean_k3", 0.01)
    expected = []
    for row in rows:
        k2 = [math.log(r) ** 2 / 2 if r else math.inf for r in row]
        k3 = [r - 1 - math.log(r) if r else math.inf for r in row]
        small = max_k2 is None or max(k2, default=0) <= max_k2
        near = mean_k3 is None or sum(k3) / max(len(k3), 1) <= mean_k3
        expected.append(bool(row) and small and near)
    assert 0 < sum(expected) < len(rows) - 1
    assert _rows(trust_region_mask(log_ratios(*given), **bounds), given[2]) == expected


def test_the_default_bound_lets_a_ratio_of_one_and_a_half_pass_and_more_than_1_56_not():
    rows = [[math.exp(math.sqrt(0.2)) * (1 + shift)] for shift in (-1e-6, 1e-6)]
    rows += [[math.exp(-math.sqrt(0.2)) * (1 + shift)] for shift in (-1e-6, 1e-6)]
    given = _ratios(rows)
    assert _rows(trust_region_mask(log_ratios(*given), mean_k3=None), given[2]) == [True, False, False, True]


def _exact(trainer: Tensor, rollout: Tensor, responses: Responses, **options) -> Tensor:
    return exact_trust_region_mask(trainer_logits=trainer, rollout_logits=rollout, responses=responses, **options)


def _flips_at(bound: float, mask_of) -> None:
    """The mask of one response is False just below its statistic and True just above.

    Both sides are 1e-5 of the statistic away, plus what float32 leaves of a sum over probabilities (a few 1.2e-7).
    """
    assert not mask_of(bound - 1e-5 * bound - 1e-6).any()
    assert mask_of(bound + 1e-5 * bound + 1e-6).any()


def _kl(mu: list[float], pi: list[float]) -> float:
    return math.fsum(m * math.log(m / p) if p > 0 else math.inf for m, p in zip(mu, pi, strict=True) if m > 0)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 1024])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_the_exact_trust_region_bounds_the_divergence_of_whole_distributions(scale, chunk_tokens):
    generator = torch.Generator().manual_seed(0)
    trainer, rollout = scale * torch.randn(2, 4, 5, 7, generator=generator, dtype=torch.float64)
    # The rollout would not sample these; the trainer may or may not.
    rollout[:, :, 2] = -math.inf
    trainer[0, :, 2] = -math.inf
    mask = torch.rand(4, 5, generator=generator) < 0.7
    mask[2] = False
    # Logits are known up to a constant; what is no response token is not read.
    trainer, rollout = trainer + 5, rollout - 3
    trainer[~mask], rollout[~mask] = math.nan, math.nan
    responses = Responses.padded(mask)
    for row in range(4):
        each = [
            _kl(*(logits[row, at].softmax(-1).tolist() for logits in (rollout, trainer)))
            for at in mask[row].nonzero().flatten().tolist()
        ]
        if not each:
            assert not exact_trust_region_mask(
                trainer_logits=trainer, rollout_logits=rollout, responses=responses, chunk_tokens=chunk_tokens
            )[row].any()
            continue
        for name, other, bound in (("max_kl", "mean_kl", max(each)), ("mean_kl", "max_kl", sum(each) / len(each))):

            def kept(value, name=name, other=other, row=row):
                bounds = {name: value, other: None, "chunk_tokens": chunk_tokens}
                return exact_trust_region_mask(
                    trainer_logits=trainer, rollout_logits=rollout, responses=responses, **bounds
                )[row]

            _flips_at(bound, kept)


def test_a_token_that_only_the_trainer_excludes_drops_the_sequence():
    logits = torch.zeros(3, 2, 4)
    trainer, rollout = logits.clone(), logits.clone()
    trainer[0, 1, 2] = -math.inf
    trainer[1, 1, 2], rollout[1, 1, 2] = -math.inf, -math.inf
    rollout[2, 1, 2] = -math.inf
    responses = Responses.padded(torch.ones(3, 2))
    # Row 2: KL = log(4/3) = 0.288 of one token, half of it in the mean.
    for bounds, kept in (({"max_kl": 0.28}, [False, True, False]), ({"max_kl": 0.29}, [False, True, True])):
        assert (
            _rows(
                exact_trust_region_mask(
                    trainer_logits=trainer, rollout_logits=rollout, responses=responses, mean_kl=None, **bounds
                ),
                responses,
            )
            == kept
        )
    means = exact_trust_region_mask(
        trainer_logits=trainer, rollout_logits=rollout, responses=responses, max_kl=None, mean_kl=0.145
    )
    assert _rows(means, responses) == [False, True, True]
    assert _rows(
        exact_trust_region_mask(trainer_logits=trainer, rollout_logits=rollout, responses=responses), responses
    ) == [False, True, False]


def test_default_bounds_of_the_exact_trust_region():
    """Two tokens, the second distribution equal: max 0.099 or 0.101 where the mean may be large; mean below 0.01."""

    def logits(divergence: float) -> Tensor:
        # KL of (1/2, 1/2) from (p, 1 - p) is -log(4 p (1 - p)) / 2.
        p = (1 + math.sqrt(1 - math.exp(-2 * divergence))) / 2
        return torch.tensor([math.log(p), math.log(1 - p)])

    for divergence, length, kept in ((0.099, 20, True), (0.101, 20, False), (0.0099, 1, True), (0.0101, 1, False)):
        trainer = torch.zeros(1, length, 2)
        trainer[0, 0] = logits(divergence)
        found = exact_trust_region_mask(
            trainer_logits=trainer,
            rollout_logits=torch.zeros(1, length, 2),
            responses=Responses.padded(torch.ones(1, length)),
        )
        assert found.all().item() is kept and found.any().item() is kept


def test_distributions_are_taken_a_chunk_at_a_time(monkeypatch):
    seen, kl = [], subject._kl
    monkeypatch.setattr(subject, "_kl", lambda p, q: (seen.append(len(p)), kl(p, q))[1])
    logits = torch.randn(3, 4, 5)
    exact_trust_region_mask(
        trainer_logits=logits, rollout_logits=logits, responses=Responses.padded(torch.ones(3, 4)), chunk_tokens=5
    )
    assert seen == [5, 5, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_distribution_is_refused(bad):
    logits = torch.zeros(1, 2, 3)
    for side in (0, 1):
        given = [logits.clone(), logits.clone()]
        given[side][0, 1, 0] = bad
        with pytest.raises(InputError, match="no distribution"):
            _exact(*given, Responses.padded(torch.ones(1, 2)))
        assert _exact(*given, Responses.padded(torch.tensor([[1, 0]]))).tolist() == [[True, False]]
        given[side][0, 1] = -math.inf
        with pytest.raises(InputError, match="no distribution"):
            _exact(*given, Responses.padded(torch.ones(1, 2)))


@pytest.mark.parametrize("bounds", [(None, None), (-0.1, None), (None, -0.1)])
def test_a_trust_region_needs_a_bound(bounds):
    responses, log, logits = Responses.padded(torch.ones(1, 2)), -torch.ones(1, 2), torch.ones(1, 2, 3)
    with pytest.raises(InputError, match="needs a bound"):
        trust_region_mask(log_ratios(log, log, responses), max_k2=bounds[0], mean_k3=bounds[1])
    with pytest.raises(InputError, match="needs a bound"):
        exact_trust_region_mask(
            trainer_logits=logits, rollout_logits=logits, responses=responses, max_kl=bounds[0], mean_kl=bounds[1]
        )


def test_what_lies_on_a_bound_is_kept():
    """Statistics without rounding: a log-ratio of +-1/2 or 0, equal distributions."""
    responses, log, logits = Responses.padded(torch.ones(1, 2)), torch.full((1, 2), -2.0), torch.ones(1, 2, 3)
    assert off_policy_sequence_mask(log_ratios(log - 0.5, log, responses), -torch.ones(1), max_kl=0.5).all()
    assert trust_region_mask(log_ratios(log - 0.5, log, responses), max_k2=0.125, mean_k3=None).all()
    assert trust_region_mask(log_ratios(log, log, responses), max_k2=0.0, mean_k3=0.0).all()
    assert exact_trust_region_mask(
        trainer_logits=logits, rollout_logits=logits, responses=responses, max_kl=0.0, mean_kl=0.0
    ).all()


def test_k3_estimates_the_divergence_without_bias_in_every_context():
    """E_mu of k3, read off as the bound at which the mask of each response's last token flips, is the exact KL."""
    longest = 3
    mu, pi = random_policy(1, longest), random_policy(2, longest, spread=1.5)
    rows = responses_of(longest)
    trainer, rollout = table(pi, rows, longest), table(mu, rows, longest)
    for x in contexts(longest):
        expectation = 0.0
        for token in range(3):
            row = next(at for at, each in enumerate(rows) if each[: len(x) + 1] == (*x, token))
            here = torch.zeros(len(rows), longest, dtype=torch.bool)
            here[row, len(x)] = True
            only = Responses.padded(here)
            low, high = 0.0, 100.0
            # Halved until neighbours: the statistic to 100 / 2^48 = 4e-13.
            for _ in range(48):
                middle = (low + high) / 2
                kept = trust_region_mask(log_ratios(trainer, rollout, only), max_k2=None, mean_k3=middle).any()
                low, high = (low, middle) if kept else (middle, high)
            expectation += mu[x][token] * high
        exact = _kl(list(mu[x]), list(pi[x]))
        assert expectation == pytest.approx(exact, abs=1e-12)
        distributions = [torch.tensor([[policy[x]]], dtype=torch.float64).log() for policy in (pi, mu)]
        one = Responses.padded(torch.ones(1, 1))
        _flips_at(exact, lambda bound, d=distributions, r=one: _exact(*d, r, max_kl=bound, mean_kl=None))
