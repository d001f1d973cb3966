"""Figures against closed forms on small distributions."""

from __future__ import annotations

import math

import pytest
import torch

from router_replay.errors import InputError
from router_replay.mismatch import Responses, Tally, diagnose
from router_replay.mismatch.figures.diagnostics import Diagnostics
from tests.router_replay.mismatch.pairs import log_ratios

P_ROLLOUT = (0.5, 0.25, 0.125, 0.125)
P_TRAINER = (0.25, 0.25, 0.25, 0.25)


def _sampled_exactly() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens in the very proportions of the rollout's distribution: means over them are exact expectations."""
    tokens = torch.repeat_interleave(torch.arange(4), torch.tensor([4, 2, 1, 1]))
    trainer, rollout = (torch.tensor(p, dtype=torch.float64).log()[tokens] for p in (P_TRAINER, P_ROLLOUT))
    return trainer, rollout


def _all(values: torch.Tensor) -> Responses:
    """Every token is a response of its own."""
    return Responses.packed(torch.ones(len(values), dtype=torch.bool), range(len(values) + 1))


def test_every_figure_is_the_closed_form():
    trainer, rollout = _sampled_exactly()
    found = diagnose(log_ratios(trainer, rollout, _all(trainer)), taus=(1.5, 1.99, 2.01))
    kl = sum(p * math.log(p / q) for p, q in zip(P_ROLLOUT, P_TRAINER, strict=True))
    chi2 = sum(q * q / p for p, q in zip(P_ROLLOUT, P_TRAINER, strict=True)) - 1
    assert kl == pytest.approx(0.25 * math.log(2)) and chi2 == pytest.approx(0.375)
    assert (found.num_tokens, found.num_sequences, found.zero_probability_tokens) == (8, 8, 0)
    # On exact proportions E[r] = 1, so both estimators give KL itself.
    assert found.k1 == pytest.approx(kl, rel=1e-14)
    assert found.k3 == pytest.approx(kl, rel=1e-14)
    # log r is +-log 2 for 6 of 8 tokens and 0 for the others.
    assert found.k2 == pytest.approx(0.75 * math.log(2) ** 2 / 2, rel=1e-14)
    assert found.mean_abs_difference == pytest.approx(0.75 * math.log(2), rel=1e-14)
    assert found.chi2_token == found.chi2_sequence == pytest.approx(chi2, rel=1e-14)
    assert found.ess_token == found.ess_sequence == pytest.approx(1 / (1 + chi2), rel=1e-14)
    # Both sides of 1 count.
    assert found.ratio_tails == {1.5: 0.75, 1.99: 0.75, 2.01: 0.0}
    assert (found.max_ratio, found.min_ratio) == pytest.approx((2.0, 0.5))
    # The trainer's side is constant.
    assert found.correlation is None
    assert found.perplexity_trainer == pytest.approx(4)
    assert found.perplexity_rollout == pytest.approx((4 * 2 + 2 * 4 + 2 * 8) / 8)
    assert found.perplexity_ratio == pytest.approx((4 * 2 + 2 * 1 + 2 * 0.5) / 8)


def test_sequence_figures_take_whole_responses():
    trainer = torch.tensor([[-1.0, -1.0, -9.0], [-2.0, -9.0, -9.0]], dtype=torch.float64)
    rollout = torch.tensor([[-1.5, -1.25, -1.0], [-1.0, -1.0, -1.0]], dtype=torch.float64)
    found = diagnose(log_ratios(trainer, rollout, Responses.padded(torch.tensor([[1, 1, 0], [1, 0, 0]]))))
    rho = [math.exp(0.75), math.exp(-1.0)]
    assert found.num_sequences == 2
    assert found.chi2_sequence == pytest.approx(sum((each - 1) ** 2 for each in rho) / 2)
    assert found.ess_sequence == pytest.approx(sum(rho) ** 2 / (2 * sum(each**2 for each in rho)))
    assert found.perplexity_ratio == pytest.approx((math.exp(-0.375) + math.exp(1.0)) / 2)
    assert found.perplexity_rollout == pytest.approx((math.exp(1.375) + math.exp(1.0)) / 2)
    assert found.perplexity_trainer == pytest.approx((math.exp(1.0) + math.exp(2.0)) / 2)


def test_estimators_differ_as_they_should_off_the_proportions():
    trainer, rollout = torch.tensor([-1.0, -3.0]), torch.tensor([-1.5, -2.0])
    found = diagnose(log_ratios(trainer, rollout, _all(trainer)), taus=(2.0,))
    assert found.k1 == pytest.approx(0.25)
    assert found.k2 == pytest.approx((0.5**2 + 1) / 4)
    assert found.k3 == pytest.approx(((math.exp(0.5) - 1 - 0.5) + (math.exp(-1.0) - 1 + 1.0)) / 2, rel=1e-6)
    assert found.ratio_tails == {2.0: 0.5}


def test_correlation_is_pearsons():
    torch.manual_seed(0)
    rollout = -5 * torch.rand(100, dtype=torch.float64)
    trainer = rollout - torch.rand(100, dtype=torch.float64)
    expected = torch.corrcoef(torch.stack([trainer, rollout]))[0, 1].item()
    assert diagnose(log_ratios(trainer, rollout, _all(trainer))).correlation == pytest.approx(expected, rel=1e-9)
    # The bound within which a side counts as constant is relative, so that shifts do not matter.
    constant = torch.full((100,), -1 / 3, dtype=torch.float64)
    assert diagnose(log_ratios(rollout, constant, _all(trainer))).correlation is None


def test_masked_tokens_do_not_count():
    trainer, rollout = _sampled_exactly()
    padded = [torch.cat([value, torch.tensor([-1e9, float("nan")])])[None] for value in (trainer, rollout)]
    mask = torch.tensor([[True] * 8 + [False] * 2])
    alone = Responses.padded(mask[:, :8])
    assert diagnose(log_ratios(*padded, Responses.padded(mask))) == diagnose(
        log_ratios(trainer[None], rollout[None], alone)
    )


def test_k3_of_nearly_equal_probabilities_is_not_lost_to_rounding():
    trainer = torch.full((4,), -1.0, dtype=torch.float64)
    found = diagnose(log_ratios(trainer + 1e-7, trainer, _all(trainer)))
    # x^2 / 2; exp(x) - 1 - x in float64 would be off by about eps / (x^2 / 2) = 4 %. So would mean(rho^2) - 1.
    assert found.k3 == pytest.approx(5e-15, rel=1e-3)
    assert found.chi2_token == pytest.approx(1e-14, rel=1e-3)


def test_tokens_that_the_trainer_would_never_take_are_counted_by_themselves():
    trainer = torch.tensor([[-1.0, -math.inf], [-1.0, -2.0]])
    rollout = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]])
    found = diagnose(log_ratios(trainer, rollout, Responses.padded(torch.ones(2, 2))), taus=(1e10,))
    assert found.zero_probability_tokens == 1
    assert found.k1 == pytest.approx(1 / 3)
    assert found.ratio_tails == {1e10: 0.25}
    assert found.min_ratio == 0
    assert found.chi2_token == pytest.approx((1 + (math.exp(-1) - 1) ** 2) / 4)
    assert found.ess_sequence == pytest.approx(0.5)
    assert found.perplexity_trainer == pytest.approx(math.exp(1.5))
    only = diagnose(log_ratios(trainer[:1], rollout[:1], Responses.padded(torch.ones(1, 2))))
    assert only.perplexity_trainer == only.perplexity_ratio == math.exp(300)
    assert only.perplexity_rollout == pytest.approx(math.e)


def test_effective_sample_size_needs_no_range():
    """Sequence ratios of exp(-2000) and exp(-2001): both underflow, their proportion does not."""
    trainer = torch.tensor([[-2001.0], [-2002.0]], dtype=torch.float64)
    found = diagnose(log_ratios(trainer, torch.full_like(trainer, -1.0), Responses.padded(torch.ones(2, 1))))
    w = (1.0, math.exp(-1))
    assert found.ess_sequence == pytest.approx(sum(w) ** 2 / (2 * sum(each**2 for each in w)))


def test_tallies_of_micro_batches_add_up_to_that_of_the_batch():
    torch.manual_seed(1)
    trainer, rollout = -torch.rand(6, 5) * 4, -torch.rand(6, 5) * 4
    trainer[4, 2] = -math.inf
    mask = torch.rand(6, 5) < 0.7
    mask[3] = False
    taus = (1.1, 2.0)
    whole = diagnose(log_ratios(trainer, rollout, Responses.padded(mask)), taus=taus)
    tallies = [
        Tally.of(log_ratios(trainer[at : at + 1], rollout[at : at + 1], Responses.padded(mask[at : at + 1])), taus)
        for at in range(6)
    ]
    summed = tallies[0]
    for each in tallies[1:]:
        summed = summed + each
    found = Diagnostics.of(summed)
    assert found.ratio_tails == whole.ratio_tails
    # Sums of the same float64 numbers in another order.
    assert found.flat() == pytest.approx(whole.flat(), rel=1e-12)
    with pytest.raises(InputError, match="same taus"):
        summed + Tally.of(log_ratios(trainer, rollout, Responses.padded(mask)), (3.0,))


def test_flat_names_every_figure():
    trainer, rollout = _sampled_exactly()
    routes = torch.arange(4).reshape(1, 2, 2)
    found = diagnose(
        log_ratios(trainer - 0.1 * rollout, rollout, _all(trainer)), trainer_routes=routes, rollout_routes=routes + 1
    )
    names = set(found.flat("r3/"))
    assert {
        "r3/k3",
        "r3/f_tau/1.01",
        "r3/f_tau/2",
        "r3/routes/differing",
        "r3/routes/layer_1",
        "r3/correlation",
    } <= names
    assert all(math.isfinite(value) for value in found.flat().values())


def test_tails_are_counted_for_taus_in_any_order_and_a_ratio_of_tau_is_not_beyond_it():
    """Ratios of e, sqrt(e), 1 / sqrt(e), 1 / e and 1 / e^2: halves and wholes are exact."""
    trainer, rollout = torch.tensor([-8.0, -8.5, -9.5, -10.0, -11.0]), torch.full((5,), -9.0)
    found = diagnose(log_ratios(trainer, rollout, _all(rollout)), taus=(math.e, 1.2, 2.0, 9.0))
    assert found.ratio_tails == {math.e: 0.2, 1.2: 1.0, 2.0: 0.6, 9.0: 0.0}
    assert diagnose(log_ratios(rollout, rollout, _all(rollout)), taus=()).ratio_tails == {}


@pytest.mark.parametrize(
    ("trainer", "rollout", "mask", "options", "message"),
    [
        (
            -torch.ones(1, 3),
            -torch.ones(1, 2),
            torch.ones(1, 3),
            {},
            r"rollout \[1, 2\] and the response mask \[1, 3\]",
        ),
        (-torch.ones(1, 3), -torch.ones(1, 3), torch.zeros(1, 3), {}, "counts no token"),
        (-torch.ones(1, 1), -torch.ones(1, 1), torch.ones(1, 1), {"taus": (1.0,)}, "must be above 1"),
        (torch.tensor([[-1.0, math.nan]]), -torch.ones(1, 2), torch.ones(1, 2), {}, r"the first, at \[0, 1\]"),
        (-torch.ones(1, 2), torch.tensor([[-math.inf, -1]]), torch.ones(1, 2), {}, "under the policy that sampled it"),
        (
            torch.ones(1, 2),
            -torch.ones(1, 2),
            torch.ones(1, 2),
            {},
            "2 of 2 response tokens have a log-probability above 0 in trainer, up to 1: ",
        ),
        (-torch.ones(1, 2), torch.tensor([[0.7, -1]]), torch.ones(1, 2), {}, "1 of 2 .* above 0 in rollout, up to 0.7"),
        (-torch.ones(1, 2).long(), -torch.ones(1, 2), torch.ones(1, 2), {}, "must be floating point, got torch.int64"),
        (torch.full((1, 2), -math.inf), -torch.ones(1, 2), torch.ones(1, 2), {}, "it scores other tokens"),
        (
            -torch.ones(1, 1),
            -torch.ones(1, 1),
            torch.ones(1, 1),
            {"trainer_routes": torch.ones(1, 1, 1)},
            "one side only",
        ),
    ],
)
def test_diagnose_refuses(trainer, rollout, mask, options, message):
    with pytest.raises(InputError, match=message):
        diagnose(log_ratios(trainer, rollout, Responses.padded(mask)), **options)
