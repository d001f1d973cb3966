"""Score centering against expectations that are summed over the vocabulary, and over every response of small policies.

Logits are those of one place each, so that the score of a token v is e_v - pi, whatever the model behind them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch import (
    Responses,
    SamplerTopK,
    grpo_loss,
    logprobs_at,
    masked_importance_weights,
    masked_weight,
    score_centering_loss,
    truncated_importance_weights,
    truncated_weight,
)
from tests.no_waiting import RefuseWaiting
from tests.router_replay.mismatch.pairs import log_ratios
from tests.router_replay.mismatch.tiny_policies import (
    Policy,
    batch,
    contexts,
    probability,
    random_policy,
    responses_of,
)

PLACES, VOCABULARY = 5, 6
RULES: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "TIS": partial(truncated_weight, cap=1.3),
    "MIS": partial(masked_weight, lower=0.7, upper=1.4),
}
# A dozen additions of terms below 10 in float64, and tails of which 1e-2 and more are left of 1: 1e-2 / eps digits.
EXACT = 1e-12


def _distributions(seed: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of current, old and rollout at each place, `[PLACES, VOCABULARY]`: two that differ from one."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, PLACES, VOCABULARY, generator=generator, dtype=torch.float64)
    current = 1.5 * noise[0]
    return current, current + spread * noise[1], current + spread * noise[2]


def _in_proportion(logits: Tensor, current: Tensor, kept: Tensor) -> Tensor:
    """Probabilities of the logits where kept, and elsewhere the rest in proportion to the current ones."""
    of, like = logits.softmax(-1) * kept, current.softmax(-1) * ~kept
    share = (1 - of.sum(-1, keepdim=True)) / like.sum(-1, keepdim=True).clamp(min=1e-300)
    return of + like * share


def _top_k(rollout: Tensor, k: int, responses: Responses) -> SamplerTopK:
    logprobs, ids = rollout.log_softmax(-1).topk(k, -1)
    return SamplerTopK.of(token_ids=ids, logprobs=logprobs, responses=responses, vocab_size=rollout.shape[-1])


def _kept(top_k: SamplerTopK) -> Tensor:
    return torch.zeros(PLACES, VOCABULARY, dtype=torch.bool).scatter_(-1, top_k.token_ids, True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", range(VOCABULARY + 1))
@pytest.mark.parametrize("three_policies", [False, True])
def test_the_gradient_is_the_expected_weighted_score_of_the_modelled_sampler(rule, k, three_policies):
    """Summed over the vocabulary: mu with its tail in proportion to pi, times what the loss multiplies a score by."""
    current, old, rollout = _distributions(0, 0.6)
    responses = Responses.packed(torch.ones(PLACES), range(PLACES + 1))
    advantages = torch.tensor([1.0, -2.0, 0.5, -0.3, 0.0], dtype=torch.float64)[:PLACES]
    top_k = _top_k(rollout, k, responses)
    logits = current.clone().requires_grad_()
    score_centering_loss(
        top_k,
        current=logprobs_at(logits, top_k.token_ids),
        old=logprobs_at(old, top_k.token_ids) if three_policies else None,
        advantages=advantages,
        responses=responses,
        clip_low=0.3,
        clip_high=0.25,
        weigh=RULES[rule],
        aggregation="token-mean",
        denominator=1.0,
    ).backward()
    kept, pi = _kept(top_k), current.softmax(-1)
    mu = _in_proportion(rollout, current, kept)
    before = _in_proportion(old, current, kept) if three_policies else pi
    clipped = 0
    for place, advantage in enumerate(advantages.tolist()):
        wanted = torch.zeros(VOCABULARY, dtype=torch.float64)
        for v in range(VOCABULARY):
            ratio, rho = float(pi[place, v] / before[place, v]), float(before[place, v] / mu[place, v])
            weight = {"none": 1.0, "TIS": min(rho, 1.3), "MIS": rho if 0.7 <= rho <= 1.4 else 0.0}[rule]
            if (advantage > 0 and ratio > 1.25) or (advantage < 0 and ratio < 0.7):
                clipped += 1
                continue
            score = torch.eye(VOCABULARY, dtype=torch.float64)[v] - pi[place]
            wanted += float(mu[place, v]) * weight * ratio * score
        torch.testing.assert_close(logits.grad[place], advantage * wanted, rtol=0, atol=EXACT)
    assert bool(clipped) == (three_policies and k > 0)


def _expected_gradient(rule: str, mu: Tensor, policies: tuple[Tensor, Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Of the loss, without and with centering, over the tokens that mu samples at each place, `[PLACES, VOCABULARY]`.

    One response of one token for each place and token; its weight is mu's probability of the token.
    """
    current, old, rollout = (each.repeat_interleave(VOCABULARY, 0) for each in policies)
    sampled = torch.arange(VOCABULARY).repeat(PLACES)
    responses = Responses.packed(torch.ones(len(sampled)), range(len(sampled) + 1))
    advantages = torch.tensor([1.0, -1.0, 2.0, -0.5, 1.0], dtype=torch.float64).repeat_interleave(VOCABULARY)
    top_k = _top_k(rollout, k, responses)
    logits = current.clone().requires_grad_()
    logprobs = logprobs_at(logits, torch.cat([sampled[:, None], top_k.token_ids], -1))
    before = logprobs_at(old, torch.cat([sampled[:, None], top_k.token_ids], -1))
    ratios = log_ratios(before[:, 0], mu.flatten().log(), responses)
    weights = {
        "none": lambda: torch.ones(len(sampled)),
        "TIS": lambda: truncated_importance_weights(ratios, cap=1.3),
        "MIS": lambda: masked_importance_weights(ratios, lower=0.7, upper=1.4),
    }[rule]()
    shared = {"advantages": advantages, "responses": responses, "denominator": 1.0, "clip_high": 0.3}
    loss, _ = grpo_loss(current=logprobs[:, 0], old=before[:, 0], weights=mu.flatten() * weights, **shared)
    centre = score_centering_loss(
        top_k, current=logprobs[:, 1:], old=before[:, 1:], weigh=RULES[rule], weights=mu.flatten(), **shared
    )
    gradients = [torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (loss, loss + centre)]
    without, centred = (each.view(PLACES, VOCABULARY, VOCABULARY).sum(1) for each in gradients)
    return without, centred


@pytest.mark.parametrize("rule", RULES)
def test_over_the_whole_vocabulary_nothing_is_left_of_the_losss_drift(rule):
    """Of the real loss, with its ratio, its clipping by both signs and its weights."""
    policies = _distributions(1, 0.6)
    without, centred = _expected_gradient(rule, policies[2].softmax(-1), policies, VOCABULARY)
    # Masked weights stop all tokens at some places.
    assert (without.abs().amax(-1) > 1e-2).sum() >= (2 if rule == "MIS" else PLACES)
    torch.testing.assert_close(centred, torch.zeros_like(centred), rtol=0, atol=EXACT)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_nor_of_that_of_policies_whose_tails_are_in_proportion(rule, k):
    current, old, rollout = _distributions(1, 0.4)
    alone = Responses.packed(torch.ones(PLACES), range(PLACES + 1))
    kept = _kept(_top_k(rollout, k, alone))
    old, rollout = (_in_proportion(each, current, kept).log() for each in (old, rollout))
    # The tail that is in proportion could hold a token that is now more probable than one of the top-k.
    assert torch.equal(_kept(_top_k(rollout, k, alone)), kept)
    without, centred = _expected_gradient(rule, rollout.exp(), (current, old, rollout), k)
    assert without.abs().amax() > 1e-2
    torch.testing.assert_close(centred, torch.zeros_like(centred), rtol=0, atol=EXACT)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_what_another_tail_leaves_is_within_the_documented_bound(k):
    """|sum over the tail (mu - rho pi) s| <= (1 - Q) max |s|, here entry by entry, |s| <= 1."""
    policies = _distributions(2, 0.5)
    mu = policies[2].softmax(-1)
    advantages = torch.tensor([1.0, -1.0, 2.0, -0.5, 1.0], dtype=torch.float64)
    current, _, rollout = policies
    _, centred = _expected_gradient("none", mu, (current, current, rollout), k)
    left = centred.abs().amax(-1) / advantages.abs()
    tail = 1 - mu.topk(k, -1).values.sum(-1)
    assert (left <= tail + EXACT).all()
    # With one token beyond the top-k it has all of the tail under both, and the model is exact.
    assert (left.max() < EXACT) == (k == VOCABULARY - 1)


def test_a_token_that_pi_cannot_take_has_no_score():
    current, old, rollout = _distributions(1, 0.6)
    current[torch.arange(PLACES), rollout.argmax(-1)] = -math.inf
    without, centred = _expected_gradient("TIS", rollout.softmax(-1), (current, old, rollout), VOCABULARY)
    assert without.abs().max() > 1e-2
    torch.testing.assert_close(centred, torch.zeros_like(centred), rtol=0, atol=EXACT)
    # Nor where it is the old policy, too, that cannot: of two probabilities of 0 there is no ratio.
    responses = Responses.packed(torch.ones(PLACES), range(PLACES + 1))
    top_k = _top_k(rollout, 3, responses)
    leaf = current.clone().requires_grad_()
    loss = score_centering_loss(
        top_k, current=logprobs_at(leaf, top_k.token_ids), advantages=torch.ones(PLACES), responses=responses
    )
    loss.backward()
    assert loss.isfinite() and leaf.grad.isfinite().all() and leaf.grad[current.isfinite()].all()


LONGEST = 3
ROWS = responses_of(LONGEST)
RESPONSES = batch(ROWS, LONGEST)
REWARDS = torch.tensor([math.sin(3 * number) + 1 for number in range(len(ROWS))], dtype=torch.float64)


def _gradient_over_all_responses(mu: Policy, pi: Policy, rewards: Tensor, k: int, *, centred: bool) -> Tensor:
    """E_mu of the loss's gradient to the logits of each context, `[contexts, 3]`, over all responses to one prompt."""
    seen = contexts(LONGEST)
    index = {context: number for number, context in enumerate(seen)}
    logits = torch.tensor([pi[context] for context in seen], dtype=torch.float64).log().requires_grad_()
    # Any context for what is past a response's end.
    at = torch.tensor([[index[row[:t]] if t < len(row) else 0 for t in range(LONGEST)] for row in ROWS])
    sampled = torch.tensor([[row[t] if t < len(row) else -1 for t in range(LONGEST)] for row in ROWS])
    of_mu = torch.tensor([mu[context] for context in seen], dtype=torch.float64).log()[at]
    top_k = _top_k(of_mu, k, RESPONSES)
    logprobs = logprobs_at(logits[at], torch.cat([sampled[..., None], top_k.token_ids], -1))
    p_mu = torch.tensor([probability(mu, row) for row in ROWS], dtype=torch.float64)
    shared = {
        "advantages": rewards,
        "responses": RESPONSES,
        "weights": RESPONSES.expand(p_mu),
        "aggregation": "token-mean",
        "denominator": 1.0,
    }
    loss, _ = grpo_loss(current=logprobs[..., 0], old=logprobs[..., 0].detach(), **shared)
    if centred:
        loss = loss + score_centering_loss(top_k, current=logprobs[..., 1:], **shared)
    return torch.autograd.grad(-loss, logits)[0]


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_with_the_samplers_policy_the_gradient_is_that_of_the_expected_reward(k):
    """On-policy nothing is taken away, and the estimator stays unbiased: both against the derivative of the sum."""
    pi = random_policy(2, LONGEST)
    logits = torch.tensor([pi[context] for context in contexts(LONGEST)], dtype=torch.float64).log().requires_grad_()
    number = {context: place for place, context in enumerate(contexts(LONGEST))}
    logprobs = logits.log_softmax(-1)
    expected = torch.zeros((), dtype=torch.float64)
    for row, reward in zip(ROWS, REWARDS, strict=True):
        expected = expected + reward * sum(logprobs[number[row[:t]], v] for t, v in enumerate(row)).exp()
    (wanted,) = torch.autograd.grad(expected, logits)
    for centred in (False, True):
        found = _gradient_over_all_responses(pi, pi, REWARDS, k, centred=centred)
        torch.testing.assert_close(found, wanted, rtol=0, atol=EXACT)


def test_a_persistent_bias_drifts_without_centering_and_with_it_does_not():
    """All responses are worth the same, so that there is nothing to learn in any context."""
    mu, pi = random_policy(1, LONGEST), random_policy(2, LONGEST)
    same = torch.ones(len(ROWS), dtype=torch.float64)
    drift = _gradient_over_all_responses(mu, pi, same, 3, centred=False)
    assert drift.abs().amax(-1).min() > 1e-3
    found = _gradient_over_all_responses(mu, pi, same, 3, centred=True)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=EXACT)
    # Two of three tokens: the third has all of the tail.
    found = _gradient_over_all_responses(mu, pi, same, 2, centred=True)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=EXACT)
    assert _gradient_over_all_responses(mu, pi, same, 1, centred=True).abs().max() < drift.abs().max()
    nothing = _gradient_over_all_responses(mu, pi, same, 0, centred=True)
    torch.testing.assert_close(nothing, drift, rtol=0, atol=0)


def test_off_policy_what_is_left_is_the_covariance_of_reward_and_score():
    """Cov_mu(A, s) in each context, times how often mu visits it: by the sums that define it."""
    mu, pi = random_policy(1, LONGEST), random_policy(2, LONGEST)
    found = _gradient_over_all_responses(mu, pi, REWARDS, 3, centred=True)
    for place, context in enumerate(contexts(LONGEST)):
        through = [
            (probability(mu, row), float(reward), row[len(context)])
            for row, reward in zip(ROWS, REWARDS, strict=True)
            if row[: len(context)] == context and len(row) > len(context)
        ]
        scores = torch.eye(3, dtype=torch.float64) - torch.tensor(pi[context], dtype=torch.float64)
        mean = sum(mu[context][v] * scores[v] for v in range(3))
        wanted = sum(p * reward * (scores[v] - mean) for p, reward, v in through)
        torch.testing.assert_close(found[place], wanted, rtol=0, atol=EXACT)


def _one_place(k: int = 3, dtype: torch.dtype = torch.float32) -> tuple[SamplerTopK, Tensor, Responses]:
    current, _, rollout = _distributions(3, 0.5)
    responses = Responses.packed(torch.ones(PLACES), [0, 2, PLACES])
    return _top_k(rollout.float(), k, responses), current.to(dtype), responses


def test_bfloat16_logits_are_taken_as_the_numbers_that_they_are():
    top_k, logits, responses = _one_place(dtype=torch.bfloat16)
    advantages = torch.tensor([1.0, -1.0])
    found = []
    for given in (logits, logits.float()):
        leaf = given.clone().requires_grad_()
        loss = score_centering_loss(
            top_k, current=logprobs_at(leaf, top_k.token_ids), advantages=advantages, responses=responses
        )
        loss.backward()
        found.append((loss, leaf.grad.float()))
    assert found[0][0].dtype == torch.float32 and found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-6)
    # A gradient of 8 bits.
    torch.testing.assert_close(found[0][1], found[1][1], rtol=2**-8, atol=1e-7)


def test_places_that_are_no_response_token_reach_nothing_and_may_hold_nan():
    current, old, rollout = _distributions(4, 0.5)
    mask = torch.tensor([1, 0, 1, 1, 0]) > 0
    found = []
    for bad in (0.0, math.nan):
        responses = Responses.packed(mask, [0, 3, PLACES])
        given = _top_k(rollout, 3, Responses.packed(torch.ones(PLACES), [0, 3, PLACES]))
        logprobs = given.logprobs.masked_fill(~mask[:, None], bad)
        ids = given.token_ids.masked_fill(~mask[:, None], 0 if bad == 0 else VOCABULARY + 7)
        top_k = SamplerTopK.of(token_ids=ids, logprobs=logprobs, responses=responses, vocab_size=VOCABULARY)
        leaf = current.masked_fill(~mask[:, None], bad).requires_grad_()
        loss = score_centering_loss(
            top_k,
            current=logprobs_at(leaf, given.token_ids),
            old=logprobs_at(old, given.token_ids).masked_fill(~mask[:, None], bad),
            advantages=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).masked_fill(~mask, bad),
            weights=torch.tensor([0.5, 1.0, 0.25, 2.0, 3.0]).masked_fill(~mask, bad),
            responses=responses,
        )
        loss.backward()
        found.append((loss.detach(), leaf.grad))
        assert not leaf.grad[~mask].any() and leaf.grad[mask].any(-1).all()
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_rows_may_have_fewer_tokens_than_others():
    """Rows of 3, 1 and no tokens in one tensor are what they are in tensors of their own."""
    top_k, logits, _ = _one_place()
    one_each = Responses.packed(torch.ones(PLACES), range(PLACES + 1))
    counts = [3, 1, 0, 2, 3]
    ids = top_k.token_ids.masked_fill(torch.arange(3) >= torch.tensor(counts)[:, None], -1)
    # Where there is no token, whatever stands there.
    logprobs = top_k.logprobs.masked_fill(ids == -1, math.nan)
    mixed = SamplerTopK.of(token_ids=ids, logprobs=logprobs, responses=one_each, vocab_size=VOCABULARY)
    leaf = logits.clone().requires_grad_()
    score_centering_loss(
        mixed, current=logprobs_at(leaf, ids), advantages=torch.ones(PLACES, 1)[:, 0], responses=one_each
    ).backward()
    for place, k in enumerate(counts):
        alone = Responses.packed(torch.ones(1), [0, 1])
        own = SamplerTopK.of(
            token_ids=ids[place : place + 1, :k],
            logprobs=logprobs[place : place + 1, :k],
            responses=alone,
            vocab_size=VOCABULARY,
        )
        row = logits[place : place + 1].clone().requires_grad_()
        loss = score_centering_loss(
            own,
            current=logprobs_at(row, own.token_ids),
            advantages=torch.ones(1),
            responses=alone,
            denominator=float(PLACES),
        )
        loss.backward()
        torch.testing.assert_close(leaf.grad[place], row.grad[0], rtol=1e-6, atol=1e-8)
        assert bool(row.grad.any()) == (k > 0)


def test_nothing_waits():
    top_k, logits, responses = _one_place()
    leaf = logits.clone().requires_grad_()
    with RefuseWaiting():
        current = logprobs_at(leaf, top_k.token_ids)
        score_centering_loss(
            top_k,
            current=current,
            old=current.detach() + 0.1,
            advantages=torch.tensor([1.0, -1.0]),
            responses=responses,
            weigh=truncated_weight,
        ).backward()


@pytest.mark.parametrize("bad", [math.nan, 0.6])
def test_log_probabilities_that_are_none_are_loud(bad):
    top_k, logits, responses = _one_place()
    current = logprobs_at(logits, top_k.token_ids)
    current[1, 1] = bad
    loss = score_centering_loss(top_k, current=current, advantages=torch.tensor([1.0, -1.0]), responses=responses)
    assert loss.isnan()


def test_what_does_not_fit_is_refused():
    top_k, logits, responses = _one_place()
    given = {"current": logprobs_at(logits, top_k.token_ids), "advantages": torch.ones(2), "responses": responses}
    for changed, message in (
        ({"current": given["current"][:, :2]}, r"current \[5, 2\], the sampler's top-k \[5, 3\]"),
        ({"old": given["current"][:4]}, r"old \[4, 3\], the sampler's top-k"),
        ({"responses": Responses.padded(torch.ones(1, 5))}, r"and the response mask \[1, 5\] do not fit"),
        ({"advantages": torch.ones(3)}, "advantages"),
        ({"weights": torch.ones(4)}, "weights"),
        ({"clip_low": 1.5}, "a clip range needs"),
        ({"weigh": lambda log_ratio: log_ratio[..., :1]}, r"weights of the shape of its log-ratios \[5, 4\]"),
        ({"aggregation": "mean"}, "aggregation"),
        ({"denominator": 0}, "denominator"),
        ({"current": None}, "current must be a torch.Tensor"),
    ):
        with pytest.raises(InputError, match=message):
            score_centering_loss(top_k, **{**given, **changed})
    with pytest.raises(InputError, match=r"must be a SamplerTopK, got \[5, 3\]: make one with"):
        score_centering_loss(top_k.token_ids, **given)
