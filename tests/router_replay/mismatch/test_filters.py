"""What filters leave of groups, and what that does to means, denominators and gradients."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from router_replay.errors import InputError
from router_replay.mismatch import Responses, filter_responses, group_relative_advantages, grpo_loss

REWARDS = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.5]
GROUPS = ["a", "a", "b", "b", "c", "c", "d", "d"]


def test_groups_of_one_reward_leave():
    found = filter_responses(REWARDS, GROUPS)
    assert found.kept == (0, 1, 4, 5, 6, 7) and found.dropped == {"one_reward": 2}
    assert (found.kept_groups, found.num_groups, found.num_responses) == (3, 4, 8)
    assert filter_responses(REWARDS, GROUPS, one_reward=False).kept == tuple(range(8))


def test_flags_come_first_so_that_a_group_may_have_one_reward_for_them():
    flags = {"cut_off": [0, 1, 0, 0, 0, 0, 0, 1], "bad_call": torch.tensor([0, 1, 1, 0, 1, 0, 0, 0]) > 0}
    found = filter_responses(torch.tensor(REWARDS), GROUPS, flags=flags)
    # Of a, b, c and d one response is left each.
    assert found.nothing_left and found.dropped == {"cut_off": 2, "bad_call": 2, "one_reward": 4}
    assert found.flat() == {
        "filter/dropped/cut_off": 0.25,
        "filter/dropped/bad_call": 0.25,
        "filter/dropped/one_reward": 0.5,
        "filter/kept": 0.0,
        "filter/kept_groups": 0.0,
    }
    alone = filter_responses(REWARDS, GROUPS, flags=flags, one_reward=False)
    assert alone.kept == (0, 3, 5, 6) and alone.dropped == {"cut_off": 2, "bad_call": 2} and not alone.nothing_left


def test_no_responses_at_all():
    found = filter_responses([], [], flags={"cut_off": []})
    assert found.nothing_left and set(found.flat().values()) == {0.0}


def _gradient(kept, *, rewards=REWARDS, groups=GROUPS) -> torch.Tensor:
    """Of GRPO over these responses of two tokens, to the log-probabilities of all."""
    current = torch.full((len(rewards), 2), -1.0, dtype=torch.float64, requires_grad=True)
    index = torch.tensor(kept)
    responses = Responses.padded(torch.ones(len(kept), 2), [groups[number] for number in kept])
    advantages = group_relative_advantages(torch.tensor(rewards, dtype=torch.float64)[index], responses)
    own = current[index]
    grpo_loss(current=own, old=own.detach(), advantages=advantages, responses=responses)[0].backward()
    return current.grad


def test_without_groups_of_one_reward_the_gradient_is_longer_and_no_other():
    found = filter_responses(REWARDS, GROUPS)
    whole, filtered = _gradient(range(8)), _gradient(found.kept)
    assert whole.any()
    torch.testing.assert_close(filtered, whole * 8 / 6, rtol=1e-12, atol=0)


def test_what_leaves_counts_in_no_mean():
    """As if it had never been sampled: a group of rewards 1, 0, 0 and one cut off, with a reward of 1."""
    rewards, groups = [1.0, 0.0, 0.0, 1.0], [0, 0, 0, 0]
    found = filter_responses(rewards, groups, flags={"cut_off": [False, False, False, True]})
    assert found.kept == (0, 1, 2)
    alone = _gradient([0, 1, 2], rewards=rewards[:3], groups=groups[:3])
    filtered = _gradient(found.kept, rewards=rewards, groups=groups)
    assert torch.equal(filtered[:3], alone) and not filtered[3].any()
    assert not torch.allclose(_gradient(range(4), rewards=rewards, groups=groups)[:3], alone)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0]), st.booleans(), st.booleans())))
def test_every_response_stays_or_leaves_for_one_reason(rows):
    groups, rewards, first, second = ([row[at] for row in rows] for at in range(4))
    found = filter_responses(rewards, groups, flags={"first": first, "second": second})
    assert len(found.kept) + sum(found.dropped.values()) == len(rows)
    assert list(found.kept) == sorted(set(found.kept))
    sound = [number for number in range(len(rows)) if not first[number] and not second[number]]
    for number in range(len(rows)):
        rest = {rewards[other] for other in sound if groups[other] == groups[number]}
        assert (number in found.kept) == (number in sound and len(rest) > 1)
    # Filtering again takes nothing more.
    again = filter_responses([rewards[n] for n in found.kept], [groups[n] for n in found.kept])
    assert again.kept == tuple(range(len(found.kept)))


def test_what_does_not_fit_is_refused():
    for flags, message in (
        ({"cut_off": [True]}, "flags 'cut_off' must be 8 booleans, one for each reward, got 1"),
        ({"cut_off": [0.5] * 8}, "flags 'cut_off' must be 8 booleans"),
        ({"one_reward": [True] * 8}, "take another name"),
    ):
        with pytest.raises(InputError, match=message):
            filter_responses(REWARDS, GROUPS, flags=flags)
    with pytest.raises(InputError, match="7 group ids are given for 8 sequences"):
        filter_responses(REWARDS, GROUPS[:7])
    with pytest.raises(InputError, match="1 of 8 rewards are not finite; the first is nan of response 3"):
        filter_responses([*REWARDS[:3], math.nan, *REWARDS[4:]], GROUPS)
