"""Where verl 0.9.1 computes something else on purpose or by accident: both values, side by side.

A test here fails when either side changes, and then says which docstring to look at.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from verl.trainer.ppo.core_algos import (
    agg_loss,
    compute_grpo_outcome_advantage,
    compute_optimal_token_baseline_advantage,
    compute_policy_loss_gspo,
    compute_policy_loss_vanilla,
)
from verl.trainer.ppo.rollout_corr_helper import (
    compute_offpolicy_metrics,
    compute_rollout_correction_weights,
    compute_rollout_rejection_mask,
)
from verl.utils.torch_functional import masked_mean
from verl.workers.config.actor import ActorConfig

from router_replay.mismatch import (
    Responses,
    aggregate,
    diagnose,
    group_relative_advantages,
    grpo_loss,
    gspo_loss,
    icepop_weights,
    masked_importance_weights,
    optimal_token_baseline_advantages,
    truncated_importance_weights,
    trust_region_mask,
)
from tests.router_replay.mismatch.pairs import log_ratios

ROLLOUT = -50.0


def _given(*ratios: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-ratios by row, None of response beyond its end: trainer, rollout and mask."""
    width = max(map(len, ratios))
    logs = torch.tensor([row + [0.0] * (width - len(row)) for row in ratios], dtype=torch.float64)
    mask = torch.tensor([[at < len(row) for at in range(width)] for row in ratios]).long()
    return logs + ROLLOUT, torch.full_like(logs, ROLLOUT), mask


def _config(**options) -> ActorConfig:
    return ActorConfig(strategy="fsdp", ppo_micro_batch_size_per_gpu=1, rollout_n=1, **options)


def test_verl_limits_log_ratios_to_20():
    trainer, rollout, mask = _given([-30.0], [25.0], [-math.inf])
    theirs, _ = compute_rollout_correction_weights(trainer - rollout, mask, "token", 1e300)
    ours = truncated_importance_weights(log_ratios(trainer, rollout, Responses.padded(mask)), cap=math.inf)
    assert theirs.flatten().tolist() == pytest.approx([math.exp(-20), math.exp(20), math.exp(-20)], rel=1e-14)
    assert ours.flatten().tolist() == pytest.approx([math.exp(-30), math.exp(25), 0.0], rel=1e-14)
    together, _ = compute_rollout_correction_weights(*_log_ratio([-15.0, -15.0]), "sequence", 2.0)
    sequence = truncated_importance_weights(log_ratios(*_ours([-15.0, -15.0])), level="sequence")
    assert together[0, 0].item() == pytest.approx(math.exp(-20), rel=1e-13)
    assert sequence[0, 0].item() == pytest.approx(math.exp(-30), rel=1e-13)


def _log_ratio(*ratios: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    trainer, rollout, mask = _given(*ratios)
    return trainer - rollout, mask


def _ours(*ratios: list[float]) -> tuple[torch.Tensor, torch.Tensor, Responses]:
    trainer, rollout, mask = _given(*ratios)
    return trainer, rollout, Responses.padded(mask)


def test_verl_token_k1_bounds_are_of_the_inverse_ratio():
    ratios = [math.log(each) for each in (0.3, 0.6, 1.0, 1.5, 3.0)]
    theirs, _ = compute_rollout_rejection_mask(*_log_ratio(ratios), "token_k1", "0.5_4.0")
    ours = masked_importance_weights(log_ratios(*_ours(ratios)), lower=0.5, upper=4.0)
    assert theirs.tolist() == [[1, 1, 1, 1, 0]]
    assert (ours > 0).tolist() == [[False, True, True, True, True]]
    # With two thresholds for its weights verl keeps what we keep.
    icepop, _ = compute_rollout_correction_weights(*_log_ratio(ratios), "token", "0.5_4.0")
    assert (icepop > 0).equal(ours > 0)
    sums, _ = compute_rollout_rejection_mask(*_log_ratio(ratios[:1], ratios[-1:]), "seq_sum_k1", "0.5_4.0")
    assert sums.tolist() == [[1], [0]]


def test_verl_chi2_is_without_the_control_variate():
    """mean(rho^2) - 1 = mean((rho - 1)^2) + 2 (mean(rho) - 1); of ratios below 1 it is negative."""
    logs = [math.log(0.5), math.log(0.8)]
    theirs = compute_offpolicy_metrics(*_given(logs))
    ours = diagnose(log_ratios(*_ours(logs)))
    assert ours.chi2_token == pytest.approx((0.25 + 0.04) / 2, rel=1e-13)
    assert theirs["chi2_token"] == pytest.approx((0.25 + 0.64) / 2 - 1, rel=1e-13)
    assert theirs["chi2_token"] == pytest.approx(ours.chi2_token + 2 * (0.65 - 1), rel=1e-12)
    assert ours.chi2_sequence == pytest.approx(0.36, rel=1e-12)
    assert theirs["chi2_seq"] == pytest.approx(0.16 - 1, rel=1e-12)
    # And its log-ratios end at 20 there, too.
    assert compute_offpolicy_metrics(*_given([25.0]))["chi2_token"] == pytest.approx(math.exp(40), rel=1e-12)
    assert diagnose(log_ratios(*_ours([25.0]))).chi2_token == pytest.approx(math.expm1(25) ** 2, rel=1e-12)


def test_verl_means_divide_by_count_plus_1e_8():
    """To be seen with a float64 mask only: in float32, to which an integer count is promoted, 1 + 1e-8 is 1."""
    values, mask = torch.full((1, 1), 3.0, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    assert masked_mean(values, mask).item() == pytest.approx(3 - 3e-8, rel=1e-12)
    assert masked_mean(values, mask.long()).item() == 3
    loss = agg_loss(values, mask, "seq-mean-token-mean").item()
    assert loss == pytest.approx(3 - 3e-8, rel=1e-12)
    assert aggregate(values, Responses.padded(mask), "sequence-mean").item() == 3
    # Next to its own 1e-8 the baseline of sequences of little energy goes to 0.
    given = _baseline_inputs(energy=1e-8)
    theirs, _ = compute_optimal_token_baseline_advantage(*given[:2], np.zeros(2), *given[2:])
    ours = optimal_token_baseline_advantages(given[0], *given[2:], Responses.padded(given[1], [0, 0]))
    # G = 1 and 3, equal energies: baseline 2; of 2e-8 / (2e-8 + 1e-8) only two thirds. Energies are off by 1e-16.
    assert ours.flatten().tolist() == pytest.approx([-1, 1], abs=1e-6)
    assert theirs.flatten().tolist() == pytest.approx([1 - 4 / 3, 3 - 4 / 3], abs=1e-6)


def _baseline_inputs(energy: float) -> tuple[torch.Tensor, ...]:
    """Rewards, mask, log-probabilities and sums of squares of two responses of one token, of given energy."""
    probability = 0.5
    squares = torch.full((2, 1), energy - 1 + 2 * probability, dtype=torch.float64)
    log = torch.full((2, 1), math.log(probability), dtype=torch.float64)
    return torch.tensor([[1.0], [3.0]], dtype=torch.float64), torch.ones(2, 1).long(), log, squares


def test_verl_counts_rows_without_a_response_in_means_over_sequences():
    """As perplexity 1 and ratio 1; ours are means over sequences that have tokens."""
    theirs = compute_offpolicy_metrics(*_given([-1.0], []))
    ours = diagnose(log_ratios(*_ours([-1.0], [])))
    assert ours.perplexity_ratio == pytest.approx(math.e, rel=1e-13)
    assert theirs["ppl_ratio"] == pytest.approx((math.e + 1) / 2, rel=1e-13)
    assert ours.perplexity_rollout == pytest.approx(math.exp(50), rel=1e-13)
    assert theirs["rollout_ppl"] == pytest.approx((math.exp(50) + 1) / 2, rel=1e-13)
    assert theirs["training_ppl"] == pytest.approx((math.exp(51) + 1) / 2, rel=1e-13)
    assert theirs["chi2_seq"] == pytest.approx((math.exp(-2) + 1) / 2 - 1, rel=1e-12)
    assert ours.chi2_sequence == pytest.approx(math.expm1(-1) ** 2, rel=1e-12)


def test_verl_figures_are_infinite_after_one_token_of_probability_0():
    theirs = compute_offpolicy_metrics(*_given([-1.0, -math.inf], [1.0]))
    ours = diagnose(log_ratios(*_ours([-1.0, -math.inf], [1.0])))
    assert theirs["kl"] == theirs["k3_kl"] == theirs["ppl_ratio"] == theirs["training_ppl"] == math.inf
    assert ours.zero_probability_tokens == 1
    assert ours.k1 == pytest.approx(0, abs=1e-13) and ours.perplexity_ratio == pytest.approx(math.exp(-1), rel=1e-13)


def test_verl_keeps_an_impossible_token_in_a_long_response():
    """Its k3 is limited to that of exp(-20), 19 nats, which a mean over 2000 tokens brings below 0.01."""
    logs = [-math.inf] + [0.0] * 2000
    theirs, _ = compute_rollout_rejection_mask(*_log_ratio(logs), "seq_mean_k3", "0.01")
    assert theirs.all() and not trust_region_mask(log_ratios(*_ours(logs)), max_k2=None).any()


def test_verl_effective_sample_size_of_sequences_counts_tokens_and_truncated_weights():
    logs = [[math.log(4.0), 0.0, 0.0], [0.0]]
    _, plain = compute_rollout_correction_weights(*_log_ratio(*logs), "sequence", 100.0)
    _, capped = compute_rollout_correction_weights(*_log_ratio(*logs), "sequence", 2.0)
    # Weights 4, 4, 4, 1 and 2, 2, 2, 1; ours are 4 and 1, of two sequences. 1e-8 on a mean of 3.
    assert plain["rollout_is_eff_sample_size"] == pytest.approx(13**2 / (4 * 49), rel=1e-7)
    assert capped["rollout_is_eff_sample_size"] == pytest.approx(7**2 / (4 * 13), rel=1e-7)
    assert diagnose(log_ratios(*_ours(*logs))).ess_sequence == pytest.approx(5**2 / (2 * 17), rel=1e-12)


def test_verl_weights_keep_the_nan_of_padding():
    trainer, rollout, mask = _given([0.0, 0.0], [0.0])
    trainer[1, 1] = math.nan
    theirs, _ = compute_rollout_correction_weights(trainer - rollout, mask, "token")
    assert theirs[1, 1].isnan()
    assert truncated_importance_weights(log_ratios(trainer, rollout, Responses.padded(mask))).tolist() == [
        [1, 1],
        [1, 0],
    ]


def test_verl_raises_when_masked_weights_leave_nothing():
    with pytest.raises(ZeroDivisionError):
        compute_rollout_correction_weights(*_log_ratio([2.0]), "token", "0.5_2.0")
    assert icepop_weights(log_ratios(*_ours([2.0])), upper=2.0).tolist() == [[0.0]]


def test_verl_gives_a_group_of_one_its_reward_as_advantage():
    mask = torch.ones(3, 1).long()
    rewards = torch.tensor([[7.0], [1.0], [3.0]])
    theirs, _ = compute_grpo_outcome_advantage(rewards, mask, np.array([0, 1, 1]))
    ours = group_relative_advantages(rewards[:, 0], Responses.padded(mask, [0, 1, 1]))
    # std of 1 and 3 is sqrt 2; float32.
    assert theirs.flatten().tolist() == pytest.approx([7.0, -(0.5**0.5), 0.5**0.5], rel=3e-6)
    assert ours.tolist() == pytest.approx([0.0, -(0.5**0.5), 0.5**0.5], rel=3e-6)


def test_verl_loss_of_a_batch_without_response_tokens_is_nan():
    losses, mask = torch.ones(2, 3), torch.zeros(2, 3).long()
    for ours, theirs in (("token-mean", "token-mean"), ("sequence-mean", "seq-mean-token-mean")):
        assert agg_loss(losses, mask, theirs).isnan()
        assert aggregate(losses, Responses.padded(mask), ours).item() == 0


def test_verl_clips_negative_advantages_at_a_ratio_of_3():
    """And limits the ratio to exp(20)."""
    for log, advantage, options, theirs, ours in (
        (2.0, -1.0, {}, 3.0, math.exp(2)),
        (2.0, -1.0, {"clip_ratio_c": 1e9}, math.exp(2), math.exp(2)),
        (25.0, -1.0, {"clip_ratio_c": 1e300}, math.exp(20), math.exp(25)),
    ):
        trainer, rollout, mask = _given([log])
        advantages = torch.full_like(trainer, advantage)
        loss, _ = compute_policy_loss_vanilla(rollout, trainer, advantages, mask, "token-mean", _config(**options))
        assert loss.item() == pytest.approx(theirs, rel=1e-13)
        assert grpo_loss(current=trainer, old=rollout, advantages=advantages, responses=Responses.padded(mask))[
            0
        ].item() == pytest.approx(ours, rel=1e-13)


def test_verl_limits_the_log_of_a_sequence_ratio_to_10():
    trainer, rollout, mask = _given([12.0, 14.0])
    loss, _ = compute_policy_loss_gspo(rollout, trainer, -torch.ones(1, 2), mask, config=_config())
    assert loss.item() == pytest.approx(math.exp(10), rel=1e-12)
    assert gspo_loss(current=trainer, old=rollout, advantages=-torch.ones(1), responses=Responses.padded(mask))[
        0
    ].item() == pytest.approx(math.exp(13), rel=1e-12)


def test_verl_gradient_of_a_sequence_weighs_each_token_by_its_own_weight():
    """Equal losses, other gradients: verl's token gets w_t / T, ours mean(w) / T, a token of weight 0 as well."""
    log = torch.zeros(1, 2, dtype=torch.float64) - 1
    weights, mask = torch.tensor([[2.0, 0.0]], dtype=torch.float64), torch.ones(1, 2).long()
    theirs, ours = (log.clone().requires_grad_() for _ in range(2))
    # Negative advantages are clipped below s = 1 - low only.
    loss, _ = compute_policy_loss_gspo(
        log, theirs, -torch.ones(1, 2).double(), mask, config=_config(), rollout_is_weights=weights
    )
    loss.backward()
    own = gspo_loss(
        current=ours, old=log, advantages=-torch.ones(1).double(), responses=Responses.padded(mask), weights=weights
    )[0]
    own.backward()
    assert loss.item() == own.item() == 1.0
    assert theirs.grad.tolist() == [[1.0, 0.0]]
    assert ours.grad.tolist() == [[0.5, 0.5]]


def test_verl_numbers_tokens_of_the_baseline_by_their_place_in_the_row():
    """Row 0 has a token of others in its middle: its second token meets row 1's third in verl, its second in ours."""
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 4.0]], dtype=torch.float64)
    log, squares = (torch.full((2, 3), value, dtype=torch.float64) for value in (math.log(0.5), 0.5))
    theirs, _ = compute_optimal_token_baseline_advantage(rewards, mask, np.zeros(2), log, squares, epsilon=0.0)
    ours = optimal_token_baseline_advantages(rewards, log, squares, Responses.padded(mask, [0, 0]))
    # Energy 1/2 per token. First tokens: (1 + 4) / 2. Then ours (1 + 4) / 2 and nothing, since only row 1 has a third.
    assert ours.tolist() == [pytest.approx([-1.5, 0, -1.5]), pytest.approx([1.5, 1.5, 4.0])]
    # verl: row 1's second alone, and (2 * 1 + 3 * 4) / 5, which its zero tail, by length, then takes from row 1.
    assert theirs.tolist() == [pytest.approx([-1.5, 0, 1 - 2.8]), pytest.approx([1.5, 0.0, 4.0])]
