"""Weights, masks and figures against verl's own, where both mean the same: random batches, holes and empty rows too.

Both take the exponential of the same logarithms of size below 20, summed over up to 16 tokens: 512 times the dtype's
eps bounds what rounding can do to a weight. What is compared with a bound is checked to lie off it.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from verl.trainer.ppo.rollout_corr_helper import (
    compute_offpolicy_metrics,
    compute_rollout_correction_weights,
    compute_rollout_rejection_mask,
)

from router_replay.mismatch import (
    diagnose,
    icepop_weights,
    masked_importance_weights,
    self_normalized_weights,
    truncated_importance_weights,
    trust_region_mask,
)
from tests.router_replay.mismatch.pairs import log_ratios
from tests.router_replay.mismatch.verl_batches import Batch, random_batch

BATCHES = [
    {"seed": 0},
    {"seed": 1, "holes": True, "empty": True},
    {"seed": 2, "rows": 5, "width": 16, "holes": True, "dtype": torch.float32},
    {"seed": 3, "empty": True, "dtype": torch.float32},
    {"seed": 4, "rows": 1, "width": 1},
]


@pytest.fixture(params=BATCHES, ids=lambda options: f"batch{options['seed']}")
def batch(request) -> Batch:
    return random_batch(**request.param)


def _weights(batch: Batch, level: str, threshold: float | str, normalize: bool = False) -> torch.Tensor:
    ratio = batch.trainer - batch.rollout
    return compute_rollout_correction_weights(ratio, batch.mask, level, threshold, normalize)[0]


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=512 * torch.finfo(found.dtype).eps, atol=0)


def _kept(batch: Batch, option: str, threshold: float | str) -> torch.Tensor:
    ratio = batch.trainer - batch.rollout
    return compute_rollout_rejection_mask(ratio, batch.mask, option, str(threshold))[0].bool()


def _statistics(batch: Batch, of_token, of_sequence) -> list[float]:
    """A statistic of every sequence that has tokens, in float64 and token by token."""
    ratio = (batch.trainer - batch.rollout).double()
    rows = [ratio[row][batch.mask[row].bool()].tolist() for row in range(len(ratio))]
    return [of_sequence([of_token(each) for each in row]) for row in rows if row]


def _bounds_between(statistics: list[float]) -> list[float]:
    """Below, between and above the sequences' statistics, and never so near to one that rounding could decide."""
    ordered = sorted(statistics)
    middles = [(a + b) / 2 for a, b in itertools.pairwise(ordered) if b - a > 1e-4]
    return [ordered[0] / 2, *middles[:: max(1, len(middles) // 4)], 2 * ordered[-1] + 0.1]


@pytest.mark.parametrize("cap", [0.7, 1.0, 2.0, 3.0, 1e6])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncated_weights(batch, level, cap):
    found = truncated_importance_weights(
        log_ratios(batch.trainer, batch.rollout, batch.responses), level=level, cap=cap
    )
    _close(found, _weights(batch, level, cap))


def test_the_default_cap_is_verls():
    batch = random_batch(0)
    ours = truncated_importance_weights(log_ratios(batch.trainer, batch.rollout, batch.responses))
    _close(ours, compute_rollout_correction_weights(batch.trainer - batch.rollout, batch.mask)[0])
    assert (ours == 2).any()


@pytest.mark.parametrize(("lower", "upper"), [(0.5, 2.0), (0.25, 2.5), (0.01, 5.0)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_masked_weights_are_verls_with_two_thresholds(batch, level, lower, upper):
    expected = _weights(batch, level, f"{lower}_{upper}")
    raw = _weights(batch, level, 1e9)
    assert all(((raw / bound - 1).abs() > 1e-5).all() for bound in (lower, upper))
    given = (batch.trainer, batch.rollout, batch.responses)
    _close(masked_importance_weights(log_ratios(*given), level=level, lower=lower, upper=upper), expected)
    if level == "token":
        _close(icepop_weights(log_ratios(*given), lower=lower, upper=upper), expected)


@pytest.mark.parametrize(("lower", "upper"), [(0.8, 1.25), (0.95, 1.5), (0.999, 1.001)])
def test_the_geometric_mask_is_verls_with_bounds_of_the_inverse(batch, lower, upper):
    ours = masked_importance_weights(
        log_ratios(batch.trainer, batch.rollout, batch.responses), level="geometric", lower=lower, upper=upper
    )
    means = _statistics(batch, lambda ratio: ratio, lambda row: math.fsum(row) / len(row))
    assert all(abs(mean - math.log(bound)) > 1e-5 for mean in means for bound in (lower, upper))
    assert (ours > 0).equal(_kept(batch, "seq_mean_k1", f"{1 / upper}_{1 / lower}"))


def test_the_trust_region_is_verls(batch):
    """seq_max_k2 and seq_mean_k3, alone and together, at bounds between the sequences' values."""
    given = (batch.trainer, batch.rollout, batch.responses)
    k2 = _statistics(batch, lambda ratio: ratio * ratio / 2, max)
    k3 = _statistics(batch, lambda ratio: math.exp(ratio) - 1 - ratio, lambda row: math.fsum(row) / len(row))
    shares = set()
    for max_k2 in _bounds_between(k2):
        ours = trust_region_mask(log_ratios(*given), max_k2=max_k2, mean_k3=None)
        assert ours.equal(_kept(batch, "seq_max_k2", max_k2))
        shares.add(ours.sum().item())
        for mean_k3 in _bounds_between(k3):
            both = trust_region_mask(log_ratios(*given), max_k2=max_k2, mean_k3=mean_k3)
            assert both.equal(_kept(batch, "seq_max_k2,seq_mean_k3", f"{max_k2},{mean_k3}"))
    for mean_k3 in _bounds_between(k3):
        ours = trust_region_mask(log_ratios(*given), max_k2=None, mean_k3=mean_k3)
        assert ours.equal(_kept(batch, "seq_mean_k3", mean_k3))
    assert len(shares) >= min(4, len(k2) + 1)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_self_normalized_weights_are_verls_without_truncation(batch, level):
    given = (batch.trainer, batch.rollout, batch.responses)
    ours = self_normalized_weights(log_ratios(*given), level=level, over="batch")
    # Float32: the mean is one more sum, of at most 80 weights.
    _close(ours, _weights(batch, level, 1e8, normalize=True))
    # With a cap verl truncates first: its weights are TIS over its mean, which the docstring tells apart from SNIS.
    tis = truncated_importance_weights(log_ratios(*given), level=level, cap=1.2)
    samples = tis[batch.mask.bool()] if level == "token" else tis.amax(-1)[batch.mask.any(-1)]
    _close(tis / samples.mean(), _weights(batch, level, 1.2, normalize=True))


@pytest.mark.parametrize("options", [each for each in BATCHES if not each.get("empty")], ids=lambda o: str(o["seed"]))
def test_figures_are_verls(options):
    """Float32 batches: verl's sums and exponentials are float32, ours float64."""
    batch = random_batch(**options)
    verl = compute_offpolicy_metrics(batch.trainer, batch.rollout, batch.mask)
    ours = diagnose(log_ratios(batch.trainer, batch.rollout, batch.responses))
    eps = torch.finfo(batch.trainer.dtype).eps
    # Absolute: k1 is a difference of sums of size 5, k3 takes 1 from numbers near 1 and chi-squared from mean(rho^2).
    assert ours.k1 == pytest.approx(verl["kl"], abs=64 * eps)
    assert ours.k3 == pytest.approx(verl["k3_kl"], abs=64 * eps)
    for name, theirs in (("trainer", "training_ppl"), ("rollout", "rollout_ppl"), ("ratio", "ppl_ratio")):
        assert getattr(ours, f"perplexity_{name}") == pytest.approx(verl[theirs], rel=64 * eps)
    _, metrics = compute_rollout_correction_weights(batch.trainer - batch.rollout, batch.mask, "token", 1e8)
    # verl adds 1e-8 to the mean of the weights, which are of size 1.
    assert ours.ess_token == pytest.approx(metrics["rollout_is_eff_sample_size"], rel=4e-8 + 512 * eps)
