"""The balance heuristic on policies whose responses can all be listed; each behaviour draws a fixed share of them.

Expectations are sums of at most 15 terms from a few logarithms of size below 10: 1e-13 is some twenty roundings.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from router_replay.errors import InputError
from router_replay.mismatch import Responses, balance_heuristic_weights
from tests.router_replay.mismatch.tiny_policies import (
    Policy,
    batch,
    contexts,
    probability,
    random_policy,
    responses_of,
    table,
    without,
)

LONGEST = 3
ROWS = responses_of(LONGEST)
PI = random_policy(5, LONGEST)
F = [math.sin(3 * number) + 0.5 for number in range(len(ROWS))]
TARGET = math.fsum(probability(PI, row) * f for row, f in zip(ROWS, F, strict=True))
# Of the first behaviour no response begins with 1, of the second none with 0; END is common to both.
HALVES = [
    without(random_policy(6, LONGEST), lambda context, token: not context and token == 1),
    without(random_policy(7, LONGEST), lambda context, token: not context and token == 0),
]
FULL = [random_policy(seed, LONGEST) for seed in (8, 9, 10)]


def _weights(rows: list, behaviours: list[Policy], shares: list[float], level: str) -> torch.Tensor:
    return balance_heuristic_weights(
        trainer=table(PI, rows, LONGEST),
        behaviours=torch.stack([table(behaviour, rows, LONGEST) for behaviour in behaviours]),
        shares=torch.tensor(shares, dtype=torch.float64),
        responses=batch(rows, LONGEST),
        level=level,
    )


def _possible(behaviours: list[Policy]) -> list[int]:
    """Responses that any behaviour can draw: others are refused."""
    return [at for at, row in enumerate(ROWS) if any(probability(each, row) > 0 for each in behaviours)]


@pytest.mark.parametrize(
    ("behaviours", "shares"),
    [(HALVES, [0.25, 0.75]), (HALVES, [0.5, 0.5]), (FULL, [0.125, 0.5, 0.375]), (FULL[:1], [1.0])],
)
def test_the_mean_over_all_samples_is_unbiased(behaviours, shares):
    kept = _possible(behaviours)
    weights = _weights([ROWS[at] for at in kept], behaviours, shares, "sequence")[:, 0].tolist()
    found = math.fsum(
        share * probability(behaviour, ROWS[at]) * weight * F[at]
        for share, behaviour in zip(shares, behaviours, strict=True)
        for at, weight in zip(kept, weights, strict=True)
    )
    assert found == pytest.approx(TARGET, abs=1e-13)
    # Closed form: the trainer's probability over the mixture's.
    for at, weight in zip(kept, weights, strict=True):
        mixture = math.fsum(c * probability(each, ROWS[at]) for c, each in zip(shares, behaviours, strict=True))
        assert weight == pytest.approx(probability(PI, ROWS[at]) / mixture, rel=1e-13)


def test_what_no_behaviour_covers_is_missing():
    first, shares = HALVES[:1], [1.0]
    kept = _possible(first)
    assert len(kept) == 8
    weights = _weights([ROWS[at] for at in kept], first, shares, "sequence")[:, 0].tolist()
    found = math.fsum(probability(first[0], ROWS[at]) * w * F[at] for at, w in zip(kept, weights, strict=True))
    covered = math.fsum(probability(PI, ROWS[at]) * F[at] for at in kept)
    assert found == pytest.approx(covered, abs=1e-13) and covered != pytest.approx(TARGET, abs=0.01)


def test_every_sample_may_be_a_behaviour_with_a_mask_of_its_own():
    """Three masks, fixed before the draws, that cover the vocabulary only together: one sample under each."""
    masked = [without(FULL[0], lambda context, token, out=out: token == (out + len(context)) % 3) for out in range(3)]
    kept = _possible(masked)
    weights = _weights([ROWS[at] for at in kept], masked, [1 / 3] * 3, "sequence")[:, 0].tolist()
    found = math.fsum(
        probability(behaviour, ROWS[at]) * weight * F[at] / 3
        for behaviour in masked
        for at, weight in zip(kept, weights, strict=True)
    )
    # Which responses only mixed masks allow is known: what is covered is unbiased.
    assert found == pytest.approx(math.fsum(probability(PI, ROWS[at]) * F[at] for at in kept), abs=1e-13)
    first_tokens = {ROWS[at][0] for at in kept}
    assert first_tokens == {0, 1, 2}


@pytest.mark.parametrize("equal_contexts", [True, False])
def test_weights_of_tokens_are_the_ratio_to_the_mixture_of_tokens(equal_contexts):
    """E over behaviours and their contexts; the target is the mixture's contexts only if all visit them alike."""
    shares = [0.25, 0.75]
    behaviours = [FULL[0], {**FULL[1], (): FULL[0][()]}] if equal_contexts else FULL[:2]
    weights = _weights(ROWS, behaviours, shares, "token")
    law = list(zip(shares, behaviours, strict=True))
    for place in (0, 1):
        found, target, closed = [], [], []
        for x in (each for each in contexts(LONGEST) if len(each) == place):
            visits = math.fsum(share * probability(each, x) for share, each in law)
            for token in range(3):
                value = math.cos(1 + token + 7 * sum((each + 1) * 3**at for at, each in enumerate(x)))
                row = next(at for at, each in enumerate(ROWS) if each[: place + 1] == (*x, token))
                sampled = math.fsum(share * probability(each, (*x, token)) for share, each in law)
                mixture = math.fsum(share * each[x][token] for share, each in law)
                found.append(sampled * weights[row, place].item() * value)
                closed.append(sampled * PI[x][token] / mixture * value)
                target.append(visits * PI[x][token] * value)
        assert math.fsum(found) == pytest.approx(math.fsum(closed), abs=1e-13)
        reached = math.fsum(found) == pytest.approx(math.fsum(target), abs=1e-13)
        assert reached is (place == 0 or equal_contexts)


def _variance(behaviours: list[Policy], counts: list[int], terms: list[list[float]]) -> float:
    """Of sum_m (1/n_m) sum_i terms_m(y_mi), the samples independent."""
    total = 0.0
    for behaviour, count, values in zip(behaviours, counts, terms, strict=True):
        law = [probability(behaviour, row) for row in ROWS]
        mean = math.fsum(p * value for p, value in zip(law, values, strict=True))
        total += math.fsum(p * (value - mean) ** 2 for p, value in zip(law, values, strict=True)) / count
    return total


@pytest.mark.parametrize("counts", [[1, 1, 1], [4, 1, 3], [1, 15, 2]])
def test_no_other_combination_beats_it_by_more_than_veachs_bound(counts):
    """Combinations sum_m (1/n_m) sum_i h_m f pi / mu_m with sum_m h_m(y) = 1; h_m = c_m is naive, each by itself."""
    size = sum(counts)
    shares = [count / size for count in counts]
    weights = _weights(ROWS, FULL, shares, "sequence")[:, 0].tolist()
    # (1/N) w f = (1/n_m) c_m w f.
    balanced = [[share * w * f for w, f in zip(weights, F, strict=True)] for share in shares]
    found = _variance(FULL, counts, balanced)
    bound = (1 / min(counts) - 1 / size) * TARGET**2
    generator = torch.Generator().manual_seed(sum(counts))
    splits = [torch.tensor(shares, dtype=torch.float64).expand(len(ROWS), 3)]
    splits += [torch.rand(len(ROWS), 3, generator=generator, dtype=torch.float64) ** power for power in (1, 2, 4) * 20]
    for split in splits:
        parts = (split / split.sum(-1, keepdim=True)).T.tolist()
        other = [
            [
                h * probability(PI, row) / probability(behaviour, row) * f
                for h, row, f in zip(part, ROWS, F, strict=True)
            ]
            for part, behaviour in zip(parts, FULL, strict=True)
        ]
        assert found <= _variance(FULL, counts, other) + bound
    naive = [
        [share * probability(PI, row) / probability(behaviour, row) * f for row, f in zip(ROWS, F, strict=True)]
        for share, behaviour in zip(shares, FULL, strict=True)
    ]
    assert found < _variance(FULL, counts, naive)


def test_shares_may_differ_by_sequence():
    generator = torch.Generator().manual_seed(0)
    log = -4 * torch.rand(3, 4, 5, generator=generator, dtype=torch.float64)
    responses = batch([(0,) * 5, (0,) * 2, (), (0,) * 3], 5, [0, 0, 1, 1])
    shares = torch.tensor([[0.5, 0.25, 1.0, 0.0], [0.5, 0.75, 0.0, 1.0]], dtype=torch.float64)
    for level in ("token", "sequence"):
        together = balance_heuristic_weights(
            trainer=log[0], behaviours=log[1:], shares=shares, responses=responses, level=level
        )
        for row in range(4):
            alone = batch([(0,) * int(responses.lengths[row])], 5)
            one = balance_heuristic_weights(
                trainer=log[0, [row]], behaviours=log[1:, [row]], shares=shares[:, row], responses=alone, level=level
            )
            assert together[row].equal(one[0])
        # A share of 1 is that behaviour's own ratio.
        ratio = log[0, 3, :3] - log[2, 3, :3]
        expected = (ratio.sum() if level == "sequence" else ratio).exp().expand(3)
        torch.testing.assert_close(together[3, :3], expected, rtol=1e-14, atol=0)
        assert not together[2].any()


def test_a_token_that_every_behaviour_takes_for_certain_has_weight_one():
    """Float32 shares of 1/7 sum to a little more than 1, so the mixture's logarithm is a little above 0."""
    certain = torch.zeros(1, 2)
    for level in ("sequence", "token"):
        for number in range(1, 20):
            weights = balance_heuristic_weights(
                trainer=certain,
                behaviours=certain.expand(number, 1, 2),
                shares=torch.full((number,), 1 / number),
                responses=batch([(0, 0)], 2),
                level=level,
            )
            # Shares are off by an eps each, and so is their logarithm; two tokens.
            torch.testing.assert_close(weights, torch.ones(1, 2), rtol=0, atol=2 * number * 1.2e-7)


@pytest.mark.parametrize(
    ("shares", "behaviours", "level", "message"),
    [
        ([0.5, 0.6], -torch.ones(2, 1, 2), "sequence", "sum to 1"),
        ([1.5, -0.5], -torch.ones(2, 1, 2), "sequence", "at least 0"),
        ([1.0], -torch.ones(2, 1, 2), "sequence", "one for each behaviour"),
        ([1.0], -torch.ones(1, 2), "sequence", "must be"),
        ([0.5, 0.5], torch.tensor([[[-1.0, -math.inf]], [[-math.inf, -1.0]]]), "sequence", "cannot have been sampled"),
        ([0.5, 0.5], torch.full((2, 1, 2), -math.inf), "token", "probability above 0 under the policy that sampled"),
        ([0.5, math.nan], -torch.ones(2, 1, 2), "sequence", "probability 0 .or NaN."),
        ([0.5, math.nan], -torch.ones(2, 1, 2), "token", "no log-ratio"),
        ([1.0], -torch.ones(1, 1, 2), "geometric", "no geometric|level must be"),
    ],
)
def test_a_mixture_refuses(shares, behaviours, level, message):
    with pytest.raises(InputError, match=message):
        balance_heuristic_weights(
            trainer=-torch.ones(1, 2),
            behaviours=behaviours,
            shares=torch.tensor(shares),
            responses=batch([(0, 0)], 2),
            level=level,
        )


def test_masks_that_follow_from_a_samples_own_tokens_are_no_behaviours():
    """The theorem's behaviours are fixed before the draws. A top-p mask is a function of the sample's own prefix.

    Two tokens of 0 or 1; after 0 both are allowed, after 1 only 0. Every pair of samples, each with the masks that it
    met: the expected weight of (0, 0) and (0, 1) is not the trainer's probability, though both are covered, while the
    ratio to the one policy that drew all samples, the truncated one, has that expectation.
    """
    law = {(): (0.6, 0.4), (0,): (0.5, 0.5), (1,): (0.7, 0.3)}
    covered = {(0, 0): 0.6 * 0.5, (0, 1): 0.6 * 0.5, (1, 0): 0.4}

    def under_masks_of(one: tuple[int, int], sample: tuple[int, int]) -> list[float]:
        second = law[sample[:1]][sample[1]] if one[0] == 0 else float(sample[1] == 0)
        return [math.log(law[()][sample[0]]), math.log(second) if second else -math.inf]

    mixed, single = dict.fromkeys(covered, 0.0), dict.fromkeys(covered, 0.0)
    for pair in itertools.product(covered, repeat=2):
        trainer = [[math.log(law[()][y[0]]), math.log(law[y[:1]][y[1]])] for y in pair]
        trainer = torch.tensor(trainer, dtype=torch.float64)
        masked = torch.tensor([[under_masks_of(one, y) for y in pair] for one in pair], dtype=torch.float64)
        own = torch.stack([masked[0, 0], masked[1, 1]])[None]
        half, one = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
        for found, behaviours, shares in ((mixed, masked, half), (single, own, one[:1])):
            weights = balance_heuristic_weights(
                trainer=trainer, behaviours=behaviours, shares=shares, responses=batch([(0, 0)] * 2, 2)
            )[:, 0]
            for y, weight in zip(pair, weights.tolist(), strict=True):
                found[y] += covered[pair[0]] * covered[pair[1]] * weight / 2
    assert single == pytest.approx({(0, 0): 0.3, (0, 1): 0.3, (1, 0): 0.28}, abs=1e-13)
    assert mixed[0, 0] == pytest.approx(0.26, abs=0.005) and mixed[0, 1] == pytest.approx(0.42, abs=0.005)


def test_long_responses_lose_no_digits():
    """Logarithms of 1e5 and more, in float32: their difference is the weight's."""
    generator = torch.Generator().manual_seed(0)
    rollout = -5 * torch.rand(1, 32768, generator=generator)
    trainer = rollout + 1e-3 * torch.randn(1, 32768, generator=generator)
    trainer = trainer.clamp(max=0)
    responses = Responses.padded(torch.ones(1, 32768))
    found = balance_heuristic_weights(
        trainer=trainer, behaviours=rollout[None], shares=torch.ones(1), responses=responses
    )
    expected = (trainer.double() - rollout.double()).sum().exp()
    # One rounding to float32 of the logarithm, of size 1, and one of the weight.
    assert found[0, 0].item() == pytest.approx(expected.item(), rel=3e-7)
