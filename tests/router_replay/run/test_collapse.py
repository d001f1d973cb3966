"""The collapse rule: by hand-written runs, and by what holds for every run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_replay.errors import InputError
from router_replay.run.collapse import find_collapse, window_means

RISE = [0.0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8]
"""Its best mean of 5 steps is 0.8, at its last step."""

known_rewards = st.lists(st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]), max_size=60)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ([], None),
        (RISE, None),
        # Means after the fall: 0.64, 0.48, 0.32, which is the first below 0.4, at place 11; ten of them need 12 zeros.
        (RISE + [0.0] * 11, None),
        (RISE + [0.0] * 12, 11),
        (RISE + [0.0] * 100, 11),
        # Nine low steps, and then a mean of 0.4: half of the best is not below it.
        (RISE + [0.0] * 11 + [2.0] + [0.0] * 3, None),
        # Eight low steps, and a second fall that counts from its own first one.
        (RISE + [0.0] * 8 + [0.8] * 5 + [0.0] * 12, 24),
        # It falls to a half and no lower.
        (RISE + [0.4] * 50, None),
        (RISE + [0.39] * 50, 13),
        # A best of 0 or less has no half to fall below.
        ([0.0] * 50, None),
        ([-1.0] * 20 + [-5.0] * 50, None),
        ([-1.0] * 5 + [0.5] * 5 + [-1.0] * 12, 10),
        # No window is full.
        ([1.0] * 4, None),
        ([9.0] + [0.1] * 3, None),
    ],
)
def test_runs_by_hand(run: list[float], expected: int | None):
    assert find_collapse(run) == expected


def test_the_best_is_that_so_far():
    slow = [0.2] * 20 + [1.0] * 5
    assert find_collapse([0.4] * 5 + slow) is None
    # The mean goes 0.44, 0.38, 0.32, 0.26, 0.2, which is below 0.25.
    assert find_collapse([0.5] * 5 + slow) == 9


def test_parameters_are_the_rules_numbers():
    run = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert find_collapse(run, window=1, patience=2) == 2
    assert find_collapse(run, window=2, patience=3) == 3
    assert find_collapse(run, window=2, patience=4) is None
    assert find_collapse([1.0, 0.7, 0.7], window=1, patience=2, fraction=0.75) == 1
    assert find_collapse([1.0, 0.7, 0.7], window=1, patience=2, fraction=0.7) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is a number of steps, 1 or more, got 0"),
        ({"window": 1.5}, "window is a float"),
        ({"patience": 0}, "patience is a number of steps, 1 or more, got 0"),
        ({"fraction": 0.0}, "fraction is a share of the best mean reward, above 0 and at most 1, got 0.0"),
        ({"fraction": 1.1}, "fraction is a share"),
        ({"fraction": math.nan}, "fraction is a share"),
    ],
)
def test_other_rules_are_refused(options: dict, message: str):
    with pytest.raises(InputError, match=message):
        find_collapse([1.0], **options)


@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from([None, math.nan, math.inf, -math.inf])), max_size=9))
def test_steps_without_a_reward_are_left_out(missing: list[tuple[int, float | None]]):
    run: list[tuple[int, float | None]] = list(enumerate(RISE + [0.0] * 12))
    for place, nothing in missing:
        run.insert(place, (-1, nothing))
    found = find_collapse([reward for _, reward in run])
    assert found is not None and run[found][0] == 11


@given(known_rewards, known_rewards)
def test_what_comes_later_changes_nothing(run: list[float], more: list[float]):
    found, later = find_collapse(run, patience=3), find_collapse(run + more, patience=3)
    if found is not None:
        assert later == found
    elif later is not None:
        assert later > len(run) - 3


@given(known_rewards, st.sampled_from([0.25, 2.0, 1024.0]))
def test_units_of_the_reward_change_nothing(run: list[float], factor: float):
    assert find_collapse([factor * reward for reward in run]) == find_collapse(run)


@given(st.lists(st.floats(-1e6, 1e6), max_size=60).map(sorted))
def test_a_run_that_rises_does_not_collapse(run: list[float]):
    assert find_collapse(run, patience=1) is None


@given(known_rewards, st.integers(1, 7))
def test_means_are_of_the_last_steps(run: list[float], window: int):
    means = window_means(run, window)
    assert len(means) == len(run)
    for place, mean in enumerate(means):
        part = run[max(0, place + 1 - window) : place + 1]
        assert mean == (sum(part) / window if len(part) == window else None)
