"""What `python -m benchmarks.corrections` takes for exact is so, and what should have no bias has none."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.corrections import page
from benchmarks.corrections.estimators import CORRECTIONS, Correction, grpo
from benchmarks.corrections.figures import spread
from benchmarks.corrections.gradients import ascent, learnt_policies, mismatch_of
from benchmarks.corrections.policies import (
    LENGTH,
    PROMPTS,
    RESPONSES,
    VOCABULARY,
    Policies,
    all_responses,
    expected_rewards,
    gradients,
    rewards_of,
    values,
)
from benchmarks.corrections.rollouts import Rollout
from benchmarks.corrections.training import EXACT, FRESH, GROUP_SIZE, SAME, Regime, fixed_errors, generators, train
from router_replay import mismatch

SEEDS = (4, 9)

EXACTLY = 1e-11
"""Sums of 2,187 terms for each of 4 prompts, each the product of some ten float64 numbers of size 1."""


@pytest.fixture(scope="module")
def trainer() -> tuple[Policies, Tensor]:
    """Policies that have learnt something, and rewards."""
    return learnt_policies(SEEDS, 5)


def listed(trainer: tuple[Policies, Tensor], error: float) -> Rollout:
    policies, rewards = trainer
    return Rollout.of_all(policies.with_errors(fixed_errors(error, SEEDS)), policies, rewards)


def relative_bias(correction: Correction, rollout: Rollout, trainer: tuple[Policies, Tensor]) -> Tensor:
    truth = gradients(*trainer)
    return (ascent(correction, rollout, trainer[0]) - truth).norm(dim=-1) / truth.norm(dim=-1)


def test_the_gradient_is_that_of_finite_differences(trainer) -> None:
    policies, rewards = trainer
    found, step = gradients(policies, rewards), 1e-5
    at = 0
    for field in dataclasses.fields(Policies):
        size = getattr(policies, field.name)[0].numel()
        for place in range(0, size, 7):
            moved = []
            for sign in (1, -1):
                parameter = getattr(policies, field.name).clone()
                parameter.flatten(1)[:, place] += sign * step
                moved.append(expected_rewards(dataclasses.replace(policies, **{field.name: parameter}), rewards))
            # The third derivative times step^2 / 6, and rounding of 1e-16 over the step.
            torch.testing.assert_close(found[:, at + place], (moved[0] - moved[1]) / (2 * step), rtol=0, atol=1e-8)
        at += size
    assert at == found.shape[1]


def test_all_responses_are_listed_with_their_probabilities(trainer) -> None:
    policies, rewards = trainer
    tokens = all_responses()
    assert tokens.shape == (RESPONSES, LENGTH) and len(tokens.unique(dim=0)) == RESPONSES
    probabilities = policies.probabilities()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, PROMPTS, dtype=torch.float64), rtol=0, atol=EXACTLY)
    by_prompt = tokens.repeat(PROMPTS, 1).expand(2, -1, -1)
    along = policies.log_distributions(by_prompt).gather(-1, by_prompt[..., None])[..., 0].sum(-1)
    torch.testing.assert_close(along.exp(), probabilities.flatten(1), rtol=0, atol=EXACTLY)
    assert rewards_of(rewards, by_prompt).equal(rewards.flatten(1))
    # The next token hangs on the first one, six places before.
    last = policies.log_distributions(by_prompt)[0, :RESPONSES, -1].view(VOCABULARY, -1, VOCABULARY)
    assert (last[0] - last[1]).abs().max() > 1e-3


def test_values_are_means_over_what_may_follow(trainer) -> None:
    policies, rewards = trainer
    tokens = all_responses()[[5, 1800]].repeat(PROMPTS, 1).expand(2, -1, -1)
    found = values(policies, rewards, tokens).view(2, PROMPTS, 2, LENGTH)
    torch.testing.assert_close(found[:, :, 0, 0].mean(-1), expected_rewards(policies, rewards), rtol=0, atol=EXACTLY)
    for response, number in enumerate((5, 1800)):
        same = (all_responses()[:, :4] == all_responses()[number, :4]).all(-1)
        weights = policies.probabilities()[..., same]
        expected = (weights * rewards[..., same]).sum(-1) / weights.sum(-1)
        torch.testing.assert_close(found[:, :, response, 4], expected, rtol=0, atol=EXACTLY)


def test_sampled_responses_are_as_frequent_as_they_are_probable(trainer) -> None:
    policies, _ = trainer
    count = 40_000
    uniforms = torch.rand(2, PROMPTS * count, LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = policies.sample(uniforms).view(2, PROMPTS, count, LENGTH)
    first = torch.stack([(drawn[..., 0] == token).double().mean(-1) for token in range(VOCABULARY)], -1)
    expected = policies.probabilities().unflatten(-1, (VOCABULARY, -1)).sum(-1)
    # Five standard deviations of a share.
    assert ((first - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()
    ends = torch.stack([(drawn[..., -1] == token).double().mean(-1) for token in range(VOCABULARY)], -1)
    expected = policies.probabilities().unflatten(-1, (-1, VOCABULARY)).sum(-2)
    assert ((ends - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


def test_sequence_weights_alone_are_unbiased(trainer) -> None:
    rollout = listed(trainer, 0.3)
    assert relative_bias(CORRECTIONS["sequence IS"], rollout, trainer).max() < 1e-9
    # Also without truncation tokens' weights leave the sampler's prefixes.
    of_tokens = Correction(lambda each: grpo(each, mismatch.truncated_importance_weights(each.ratios, cap=math.inf)))
    assert relative_bias(of_tokens, rollout, trainer).min() > 0.05
    assert relative_bias(CORRECTIONS["none"], rollout, trainer).min() > 0.05


def test_with_exact_values_what_is_left_of_a_token_is_its_prefix(trainer) -> None:
    """With V of the trainer, A of a token is its own over all that may follow, whatever followed in the sample."""
    rollout = listed(trainer, 0.3)

    def loss(each: Rollout):
        weights = mismatch.truncated_importance_weights(each.ratios, cap=math.inf)
        found = mismatch.doubly_robust_advantages(each.rewards.flatten(), each.values, weights, each.responses)
        prefixes = (each.ratios.token.cumsum(-1) - each.ratios.token).exp()
        return grpo(each, weights * prefixes, found.advantages)

    assert relative_bias(Correction(loss), rollout, trainer).max() < 1e-9
    assert relative_bias(CORRECTIONS["token TIS, doubly robust"], rollout, trainer).min() > 0.01


@pytest.mark.parametrize("name", [name for name, each in CORRECTIONS.items() if each.like is None])
def test_without_mismatch_nothing_is_biased(name: str, trainer) -> None:
    assert relative_bias(CORRECTIONS[name], listed(trainer, 0.0), trainer).max() < 1e-9


@pytest.mark.parametrize("name", ["none", "token TIS, 2", "GSPO to the rollout, 0.1", "token TIS, doubly robust"])
def test_samples_have_the_mean_that_all_responses_have(name: str, trainer) -> None:
    policies, rewards = (trainer[0].map(lambda each: each[:1]), trainer[1][:1])
    sampler = policies.with_errors(fixed_errors(0.3, SEEDS[:1]))
    expected = ascent(CORRECTIONS[name], Rollout.of_all(sampler, policies, rewards), policies)
    batches = 400
    size = (batches, PROMPTS * GROUP_SIZE, LENGTH + 1)
    uniforms = torch.rand(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sampler, repeated = (side.map(lambda each: each.expand(batches, *each.shape[1:])) for side in (sampler, policies))
    rollout = Rollout.sampled(sampler, repeated, rewards.expand(batches, -1, -1), uniforms)
    found = ascent(CORRECTIONS[name], rollout, repeated)
    # Of 152 parameters the largest distance, in standard deviations of the mean.
    assert ((found.mean(0) - expected[0]).abs() / (found.std(0) / batches**0.5 + 1e-12)).max() < 4.5


def test_the_mismatch_is_that_of_samples(trainer) -> None:
    policies, rewards = trainer
    seen = mismatch_of(listed(trainer, 0.3))
    uniforms = torch.rand(
        2, PROMPTS * 4000, LENGTH + 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    sampled = Rollout.sampled(policies.with_errors(fixed_errors(0.3, SEEDS)), policies, rewards, uniforms)
    for lane in range(len(SEEDS)):
        figures = mismatch.diagnose(sampled.lanes(slice(lane, lane + 1)).ratios, taus=(2.0,))
        assert float(seen["k3"][lane]) == pytest.approx(float(figures.k3), rel=0.1)
        assert float(seen["f_tau_2"][lane]) == pytest.approx(float(figures.ratio_tails[2.0]), rel=0.1, abs=1e-3)
        assert float(seen["ess_token"][lane]) == pytest.approx(float(figures.ess_token), rel=0.1)
    assert (seen["ess_sequence"] < seen["ess_token"]).all()


def test_a_seed_is_the_same_whenever_and_beside_whatever_it_runs() -> None:
    regime = Regime("short", updates=2, lag=1, kinds=(EXACT, SAME, FRESH))
    once, again, alone = (train(regime, seeds, 4, 2) for seeds in (SEEDS, SEEDS, SEEDS[1:]))
    assert once.keys() == again.keys() == alone.keys() and len(once) == 1 + 3 * len(CORRECTIONS)
    for name, rewards in once.items():
        assert rewards.equal(again[name]) and rewards.shape == (3, 2)
        # Other numbers of lanes may be multiplied in another order.
        torch.testing.assert_close(rewards[:, 1:], alone[name], rtol=0, atol=1e-9)
        assert (rewards[0] == once["control", EXACT][0]).all()


def test_without_errors_and_lag_arms_are_the_control() -> None:
    found = train(Regime("short", kinds=(EXACT, SAME, FRESH)), SEEDS, 3, 1)
    control = found["control", EXACT]
    assert (control[1] != control[0]).all()
    for name in ("none", "token TIS, 2", "sequence IS", "sequence MIS, 0.5 to 2", "sequence SNIS, group"):
        torch.testing.assert_close(found[name, EXACT], control, rtol=0, atol=1e-9)
        assert (found[name, SAME][1] != control[1]).all() and (found[name, FRESH][1] != found[name, SAME][1]).all()
    older = train(Regime("short", lag=2, kinds=(EXACT,)), SEEDS, 3, 1)
    torch.testing.assert_close(older["control", EXACT], control, rtol=0, atol=1e-9)
    assert (older["none", EXACT][1] != control[1]).all()


def test_an_error_of_the_weights_is_the_same_in_every_step() -> None:
    first, again = fixed_errors(0.5, SEEDS), fixed_errors(0.5, SEEDS)
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert [float(each.initial_seed()) for each in generators(SEEDS, 2)] == [4002, 9002]
    assert torch.cat([each.flatten() for each in first]).std() == pytest.approx(0.5, abs=0.1)


def test_a_spread_is_the_median_and_the_range() -> None:
    assert spread([3.0, 1.0, 2.0, 10.0, 0.5]) == {"median": 2.0, "lowest": 0.5, "highest": 10.0}


def test_the_results_are_of_the_corrections_that_there_are() -> None:
    results = Path(page.__file__).parents[1] / "results" / "corrections.json"
    figures = json.loads(results.read_text())
    assert len(figures["settings"]["seeds"]) >= 5
    for group in (figures["gradients"], figures["training"]):
        assert all(list(of["corrections"]) == list(CORRECTIONS) for of in group.values())
    table = page.bias(figures)
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[6:-2]] == list(CORRECTIONS)


def test_a_bias_that_is_not_resolved_is_shown_as_a_bound() -> None:
    unresolved = {"bias": spread([0.0, 0.1]), "resolution": spread([0.2, 0.2]), "noise": spread([1.0])}
    resolved = {**unresolved, "bias": spread([0.5, 0.7])}
    assert page.shown_bias(unresolved) == "<0.40"
    assert page.shown_bias(resolved) == "0.60 (0.50 to 0.70)"
