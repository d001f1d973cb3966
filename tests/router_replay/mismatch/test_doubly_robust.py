"""Doubly robust values against the exact value of every context, and group-relative and token-baseline advantages.

All policies are small enough to list every response; float64 sums of at most 15 terms of size up to about 10, each
from some twenty roundings of 1.1e-16: 1e-13 is ample and a hundred times below any bias that is asserted.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch import Responses, doubly_robust_advantages, truncated_importance_weights
from tests.router_replay.mismatch.pairs import log_ratios
from tests.router_replay.mismatch.tiny_policies import (
    Context,
    batch,
    contexts,
    probability,
    random_policy,
    responses_of,
    table,
)

LONGEST = 3
ROWS = responses_of(LONGEST)
MU, PI = random_policy(11, LONGEST), random_policy(12, LONGEST)
RESPONSES = batch(ROWS, LONGEST)
CORRECT = truncated_importance_weights(
    log_ratios(table(PI, ROWS, LONGEST), table(MU, ROWS, LONGEST), RESPONSES), cap=math.inf
)
P_MU = torch.tensor([probability(MU, row) for row in ROWS], dtype=torch.float64)


def _reward(prefix: Context) -> float:
    """Of the last token, given what came before."""
    return math.cos(2 + sum((token + 1) * 5**at for at, token in enumerate(prefix)))


def _at_the_end(prefix: Context) -> float:
    return _reward(prefix) if prefix in ROWS else 0.0


def _values(reward, discount: float, prefix: Context = ()) -> dict[Context, float]:
    """V of every context and Q of every prefix with its last token, under the trainer, backwards from the end."""
    found, mean = {}, 0.0
    for token in range(3):
        taken = (*prefix, token)
        after = 0.0
        if taken not in ROWS:
            below = _values(reward, discount, taken)
            after = below[taken]
            found |= {("Q", *each[1:]) if each[:1] == ("Q",) else each: value for each, value in below.items()}
        found[("Q", *taken)] = reward(taken) + discount * after
        mean += PI[prefix][token] * found[("Q", *taken)]
    return found | {prefix: mean}


def _tokens(of) -> Tensor:
    """A function of the prefix up to and with the token, as a tensor; NaN past the end."""
    rows = [[of(row[: at + 1]) for at in range(len(row))] + [math.nan] * (LONGEST - len(row)) for row in ROWS]
    return torch.tensor(rows, dtype=torch.float64)


def _wrong_action_values(prefix: Context) -> float:
    return 2 * math.sin(1 + sum((token + 1) * 3**at for at, token in enumerate(prefix)))


def _wrong_values(prefix: Context) -> float:
    """Their mean under the trainer, before the last token of the prefix."""
    return math.fsum(PI[prefix[:-1]][token] * _wrong_action_values((*prefix[:-1], token)) for token in range(3))


def _conditional_means(values: Tensor) -> dict[Context, float]:
    """E_mu of the value before the next token, given each context."""
    return {
        x: sum(
            (P_MU[at] * values[at, len(x)]).item()
            for at, row in enumerate(ROWS)
            if len(row) > len(x) and row[: len(x)] == x
        )
        / probability(MU, x)
        for x in contexts(LONGEST)
    }


@pytest.mark.parametrize("discount", [1.0, 0.7])
@pytest.mark.parametrize("reward", [_reward, _at_the_end])
@pytest.mark.parametrize("action_values", [True, False])
def test_right_ratios_make_any_values_right(reward, discount, action_values):
    values = _tokens(_wrong_values) if action_values else _tokens(lambda prefix: 3 + _wrong_action_values(prefix[:-1]))
    rewards = _tokens(reward)
    if reward is _at_the_end:
        rewards = torch.tensor([reward(row) for row in ROWS], dtype=torch.float64)
    found = doubly_robust_advantages(
        rewards,
        values,
        CORRECT,
        RESPONSES,
        action_values=_tokens(_wrong_action_values) if action_values else None,
        discount=discount,
    )
    true = _values(reward, discount)
    for x, mean in _conditional_means(found.values).items():
        assert mean == pytest.approx(true[x], abs=1e-13), x


@pytest.mark.parametrize("discount", [1.0, 0.7])
@pytest.mark.parametrize("reward", [_reward, _at_the_end])
def test_right_action_values_make_any_ratios_right(reward, discount):
    true = _values(reward, discount)
    wrong = 0.2 + 2 * CORRECT.square() * (1 + torch.arange(LONGEST))
    arguments = (_tokens(reward), _tokens(lambda prefix: true[prefix[:-1]]), wrong, RESPONSES)
    found = doubly_robust_advantages(
        *arguments, action_values=_tokens(lambda prefix: true[("Q", *prefix)]), discount=discount
    )
    for x, mean in _conditional_means(found.values).items():
        assert mean == pytest.approx(true[x], abs=1e-13), x
    # The second protection needs action values: the values of contexts alone do not have it.
    without = doubly_robust_advantages(*arguments, discount=discount)
    assert _conditional_means(without.values)[()] != pytest.approx(true[()], abs=0.01)


def test_wrong_ratios_and_wrong_values_are_wrong_together():
    found = doubly_robust_advantages(
        _tokens(_reward),
        _tokens(_wrong_values),
        CORRECT.clamp(max=1.0),
        RESPONSES,
        action_values=_tokens(_wrong_action_values),
    )
    assert _conditional_means(found.values)[()] != pytest.approx(_values(_reward, 1.0)[()], abs=0.01)


def test_truncated_weights_leave_the_values_not_zero():
    """With weights of 0 nothing is corrected: V is returned, where truncated weights on returns would give 0."""
    values = _tokens(_wrong_values)
    found = doubly_robust_advantages(_tokens(_reward), values, torch.zeros_like(CORRECT), RESPONSES)
    assert found.values[RESPONSES.mask].equal(values[RESPONSES.mask])


@pytest.mark.parametrize("discount", [1.0, 0.7])
def test_advantages_take_the_corrected_value_after_the_token(discount):
    """Their weighted mean is the policy gradient's: E_mu[rho A | x, a] = rho (Q(x, a) - V(x))."""
    true = _values(_reward, discount)
    baseline = _tokens(lambda prefix: 3 + _wrong_action_values(prefix[:-1]))
    found = doubly_robust_advantages(_tokens(_reward), baseline, CORRECT, RESPONSES, discount=discount).advantages
    for prefix in {row[: at + 1] for row in ROWS for at in range(len(row))}:
        place = len(prefix) - 1
        mean = sum(
            (P_MU[at] * found[at, place]).item() for at, row in enumerate(ROWS) if row[: place + 1] == prefix
        ) / probability(MU, prefix)
        assert mean == pytest.approx(true[("Q", *prefix)] - 3 - _wrong_action_values(prefix[:-1]), abs=1e-13)
    assert (found[~RESPONSES.mask] == 0).all()


def test_advantages_are_over_the_value_of_the_context_with_action_values_too():
    found = doubly_robust_advantages(
        _tokens(_reward),
        _tokens(_wrong_values),
        CORRECT,
        RESPONSES,
        action_values=_tokens(_wrong_action_values),
    ).advantages
    true = _values(_reward, 1.0)
    for token in range(3):
        rows = [at for at, row in enumerate(ROWS) if row[0] == token]
        mean = sum((P_MU[at] * found[at, 0]).item() for at in rows) / MU[()][token]
        assert mean == pytest.approx(true[("Q", token)] - _wrong_values((token,)), abs=1e-13)


def test_tokens_of_others_in_between_neither_count_nor_discount():
    generator = torch.Generator().manual_seed(0)
    reward, value, weight, action = torch.rand(4, 1, 3, generator=generator, dtype=torch.float64)
    packed = doubly_robust_advantages(
        reward, value, weight, Responses.padded(torch.ones(1, 3)), action_values=action, discount=0.5
    )
    places, gaps = torch.tensor([1, 4, 6]), torch.full((4, 8), math.nan, dtype=torch.float64)
    gaps[:, places] = torch.cat([reward, value, weight, action])
    mask = torch.zeros(8, dtype=torch.bool)
    mask[places] = True
    responses = Responses.packed(mask, [0, 8])
    found = doubly_robust_advantages(*gaps[:3], responses, action_values=gaps[3], discount=0.5)
    assert found.values[places].equal(packed.values[0]) and found.advantages[places].equal(packed.advantages[0])
    assert not found.values[~mask].any() and not found.advantages[~mask].any()
    ends = doubly_robust_advantages(torch.tensor([2.0]), *gaps[1:3], responses, discount=0.5)
    at_last = torch.zeros(8, dtype=torch.float64)
    at_last[6] = 2
    by_token = doubly_robust_advantages(at_last, *gaps[1:3], responses, discount=0.5)
    assert ends.values.equal(by_token.values) and ends.advantages.equal(by_token.advantages)


def test_results_carry_no_gradient_and_shapes_must_fit():
    given = torch.rand(2, 3, requires_grad=True)
    responses = Responses.padded(torch.ones(2, 3))
    found = doubly_robust_advantages(given, given, given, responses)
    assert not found.values.requires_grad and not found.advantages.requires_grad
    with pytest.raises(InputError, match=r"rewards \[3\]"):
        doubly_robust_advantages(torch.ones(3), given, given, responses)
    with pytest.raises(InputError, match="action_values"):
        doubly_robust_advantages(torch.ones(2), given, given, responses, action_values=torch.ones(3, 2))
