"""How training went in a run: a curve over the steps for each quantity that it has, its best scores, its collapse."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from router_replay.report.summary import RunSummary
from router_replay.run.collapse import find_collapse, window_means

Curve = dict[int, float]
"""Values by the numbers of the steps that have one, in order; they need not be finite."""

FEW_STEPS = 20
"""Values of a curve that are drawn as they are; more of them also as means of five."""


@dataclass(frozen=True)
class Quantity:
    """What a panel shows.

    Attributes:
        name: of `router_replay.run.Dynamics`, or "k3" and "f2".
        label: of the vertical axis.
        logarithmic: its axis, since values of other orders of magnitude are what to look for.
        share: from 0 to 1, shown in per cent.
    """

    name: str
    title: str
    label: str
    logarithmic: bool = False
    share: bool = False


QUANTITIES = (
    Quantity("reward", "reward", "mean of the responses"),
    Quantity("evaluation", "evaluation", "score, held out"),
    Quantity("entropy", "entropy", "nats per token"),
    Quantity("gradient_norm", "gradient norm", "before clipping", logarithmic=True),
    Quantity("response_length", "response length", "mean, tokens"),
    Quantity("longest_response", "longest response", "tokens"),
    Quantity("cut_off", "responses cut off", "share of responses", share=True),
    Quantity("clipped", "clipped", "share of tokens", share=True),
    Quantity("dropped", "dropped (weight 0)", "share of tokens", share=True),
    Quantity("dropped_responses", "dropped responses", "number"),
    Quantity("dropped_groups", "dropped groups", "number"),
    Quantity("effective_share", "effective sample size", "weights as applied", share=True),
    Quantity("k3", "KL (k3) to the rollout", "nats per token", logarithmic=True),
    Quantity("f2", "F(2)", "share of tokens", logarithmic=True),
    Quantity("route_drift", "route drift", "rows that differ", share=True),
    Quantity("route_overlap", "route overlap", "old and present policy", share=True),
    Quantity("seconds", "time", "seconds"),
)


@dataclass(frozen=True, eq=False)
class RunDynamics:
    """Of one run.

    Attributes:
        name: of the run; runs of one name are seeds of one setting.
        last_step: the number of its last step.
        curves: by the name of the quantity, those that the run has.
        collapse: the step at which the run collapses (`router_replay.run.find_collapse`), or None.
    """

    name: str
    last_step: int
    curves: dict[str, Curve]
    collapse: int | None

    @classmethod
    def of(cls, name: str, summary: RunSummary) -> RunDynamics:
        """From a run's summary; KL and F(2) are those of its first trainer pass."""
        steps, said = list(summary.dynamics), list(summary.dynamics.values())
        rewards = [each.reward for each in said]
        place = find_collapse(rewards)
        curves = {
            quantity.name: _known(zip(steps, (getattr(each, quantity.name, None) for each in said), strict=True))
            for quantity in QUANTITIES
        }
        first = next(iter(summary.passes))
        measured = [(each.step, each.passes[first]) for each in summary.steps if first in each.passes]
        curves["k3"] = {step: found.k3 for step, found in measured}
        curves["f2"] = {step: found.ratio_tails[2.0] for step, found in measured}
        if not curves["effective_share"]:
            # Of several weights the first: those of a loss come first.
            weights = ((each.step, next(iter(each.effective_shares.values()), None)) for each in summary.steps)
            curves["effective_share"] = _known(weights)
        return cls(
            name,
            max([*steps, *(each.step for each in summary.steps)]),
            {quantity: curve for quantity, curve in curves.items() if curve},
            None if place is None else steps[place],
        )

    @property
    def best_evaluation(self) -> tuple[float, int] | None:
        """The best score on held-out problems and the first step that has it."""
        return _best(self.curves.get("evaluation", {}))

    @property
    def best_reward(self) -> tuple[float, int] | None:
        """The best mean reward of five steps and the last of the first such five."""
        return _best(smooth(self.curves.get("reward", {})))


def shown(runs: Sequence[RunDynamics]) -> list[Quantity]:
    """The quantities that some run has, and that are not 0 throughout."""
    return [quantity for quantity in QUANTITIES if any(any(run.curves.get(quantity.name, {}).values()) for run in runs)]


def smooth(curve: Curve) -> Curve:
    """Means of the last five values, as the rule of collapse takes them of the reward."""
    return _known(zip(curve, window_means(list(curve.values())), strict=True))


def not_finite(runs: Sequence[RunDynamics]) -> dict[str, list[int]]:
    """The steps whose value is not finite, by the title of the quantity."""
    found: dict[str, list[int]] = {}
    for quantity in QUANTITIES:
        steps = {step for run in runs for step, value in run.curves.get(quantity.name, {}).items()
                 if not math.isfinite(value)}  # fmt: skip
        if steps:
            found[quantity.title] = sorted(steps)
    return found


def _known(pairs: Iterable[tuple[int, float | None]]) -> Curve:
    return {step: float(value) for step, value in pairs if value is not None}


def _best(curve: Curve) -> tuple[float, int] | None:
    finite = [(value, -step) for step, value in curve.items() if math.isfinite(value)]
    if not finite:
        return None
    value, step = max(finite)
    return value, -step
