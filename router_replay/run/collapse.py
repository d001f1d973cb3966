"""When a run has collapsed: the one rule that the report and a study of runs both ask."""

from __future__ import annotations

import math
from collections.abc import Sequence

from router_replay.errors import InputError
from router_replay.masks.arguments import as_integer


def find_collapse(
    rewards: Sequence[float | None], *, window: int = 5, fraction: float = 0.5, patience: int = 10
) -> int | None:
    """Where a run's reward falls and stays down: the first of `patience` steps in a row that are low.

    A step is low if the mean reward of the last `window` steps, itself included, is below `fraction` of the best such
    mean so far. Before the window is full there is no mean, and where the best mean is 0 or less there is no fraction
    to fall below: such steps are not low. So the rule is for rewards of which 0 means that nothing succeeds.

    A step without a reward, or with one that is not finite, is left out, as if the run did not have it: windows and
    rows go over the steps that have one. What comes later does not change what was found: a run that recovers after
    `patience` low steps has collapsed, one that recovers before has not.

    Args:
        rewards: mean reward of each step, in the order of the steps; None or NaN where there is none.
        window: steps that a mean is over, 1 or more.
        fraction: of the best mean, above 0 and at most 1.
        patience: low steps in a row, 1 or more.

    Returns:
        The place in `rewards`, from 0, or None where the run does not collapse.

    Raises:
        InputError: a window, fraction or patience out of its range.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"fraction is a share of the best mean reward, above 0 and at most 1, got {fraction}")
    if as_integer("patience", patience) < 1:
        raise InputError(f"patience is a number of steps, 1 or more, got {patience}")
    best = 0.0
    low: list[int] = []
    for place, mean in enumerate(window_means(rewards, window)):
        if mean is None:
            continue
        best = max(best, mean)
        low = [*low, place] if best > 0 and mean < fraction * best else []
        if len(low) == patience:
            return low[0]
    return None


def window_means(rewards: Sequence[float | None], window: int = 5) -> list[float | None]:
    """Mean reward of the last `window` steps at each step, as of `find_collapse`.

    Returns:
        One for each of `rewards`; None for a step without a reward, and for those before the window is full.

    Raises:
        InputError: a window below 1.
    """
    if as_integer("window", window) < 1:
        raise InputError(f"window is a number of steps, 1 or more, got {window}")
    known: list[float] = []
    means: list[float | None] = []
    for reward in rewards:
        if reward is None or not math.isfinite(reward):
            means.append(None)
            continue
        known.append(reward)
        means.append(math.fsum(known[-window:]) / window if len(known) >= window else None)
    return means
