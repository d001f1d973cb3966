"""Everything that the report shows of a run, gathered step by step; tokens are not kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from router_replay.errors import DataError, InputError
from router_replay.masks.agreement import RouteAgreement, RouteTally
from router_replay.mismatch.figures.diagnostics import DEFAULT_TAUS, Diagnostics
from router_replay.mismatch.figures.tally import Tally
from router_replay.mismatch.log_ratios import LogRatios
from router_replay.report.corrections import CORRECTIONS
from router_replay.report.token_sample import TokenSample
from router_replay.report.weight_figures import WeightFigures
from router_replay.run.step import RunStep

CURVE_TAUS = tuple(1 + float(excess) for excess in np.geomspace(1e-3, 1e4, 141))
"""Thresholds at which F(tau) is drawn."""


@dataclass(frozen=True, eq=False)
class StepFigures:
    """Of one step: its number, diagnostics by trainer pass, and how routes differ, if the step has them."""

    step: int
    passes: dict[str, Diagnostics]
    routes: RouteTally | None


@dataclass(frozen=True, eq=False)
class PassFigures:
    """Of one trainer pass, over all steps that have it: diagnostics, tokens to draw, and weights by correction."""

    diagnostics: Diagnostics
    sample: TokenSample
    corrections: dict[str, WeightFigures]


@dataclass(frozen=True)
class LeftOut:
    """A step that is in no figure, and why: its reason names the trainer pass or the weights."""

    step: int
    reason: str


@dataclass(frozen=True, eq=False)
class RunSummary:
    """A run's steps and what is summed over them.

    Attributes:
        steps: those with response tokens, in the order of their numbers.
        empty_steps: numbers of those without.
        left_out: steps with log-probabilities or weights that the mismatch functions refuse.
        passes: by name, in the order of the first step.
        taus: thresholds of F(tau) that the table shows; the diagnostics of the passes have many more, for the curve.
        routes: the trainer's own routes against the rollout's, over all steps, or None.
        moe_layers: decoder layers of the routes, or None where they are not known.
        weights: those that the trainer applied, by name.
        groups_of_one: no prompt has two responses.
        ungrouped_steps: numbers of the steps whose responses are of unknown prompts. If there are any, the corrections
            that compare the responses to one prompt are in no pass.
    """

    steps: tuple[StepFigures, ...]
    empty_steps: tuple[int, ...]
    left_out: tuple[LeftOut, ...]
    passes: dict[str, PassFigures]
    taus: tuple[float, ...]
    routes: RouteAgreement | None
    moe_layers: tuple[int, ...] | None
    weights: dict[str, WeightFigures]
    groups_of_one: bool
    ungrouped_steps: tuple[int, ...]


def summarize(
    steps: Iterable[RunStep], *, passes: Sequence[str] = (), taus: Sequence[float] = DEFAULT_TAUS
) -> RunSummary:
    """Gather a run's figures. Steps that the mismatch functions refuse are left out and named, with the reason.

    Args:
        steps: in the order of their numbers.
        passes: names of the trainer's passes to look at; by default all.
        taus: thresholds of F(tau) to tell in numbers, above 1.

    Raises:
        DataError: no step, no response token in any, a pass that no step has, steps with routes of other layers, or
            no step that is not left out.
    """
    gathered = _Gathered(tuple(taus))
    for step in steps:
        try:
            gathered.add(step, passes)
        except InputError as error:
            raise DataError(f"step {step.step}: {error}") from error
    return gathered.summary(passes)


class _Gathered:
    def __init__(self, taus: tuple[float, ...]) -> None:
        self.taus = taus
        self.curve = tuple(sorted({*taus, *CURVE_TAUS}))
        self.steps: list[StepFigures] = []
        self.empty: list[int] = []
        self.left_out: list[LeftOut] = []
        self.ungrouped: list[int] = []
        self.seen: dict[str, None] = {}
        self.tallies: dict[str, Tally] = {}
        self.samples: dict[str, TokenSample] = {}
        self.corrections: dict[str, dict[str, WeightFigures]] = {}
        self.weights: dict[str, WeightFigures] = {}
        self.routes: RouteTally | None = None
        self.moe_layers: tuple[int, ...] | None = None
        self.groups_of_one = True

    def add(self, step: RunStep, only: Sequence[str]) -> None:
        self.seen |= dict.fromkeys(step.trainer_logprobs)
        if not bool(step.responses.mask.any()):
            self.empty.append(step.step)
            return
        names = [name for name in step.trainer_logprobs if not only or name in only]
        try:
            # All of a step before any of it is added: a step is in every figure or in none.
            measured = {name: _measure(name, step, self.curve) for name in names}
            applied = {name: _applied(name, step) for name in step.weights}
        except InputError as error:
            self.left_out.append(LeftOut(step.step, str(error)))
            return
        routes = step.routes if step.routes is not None and int(step.routes.tokens) else None
        if routes is not None:
            if self.routes is not None and step.moe_layers != self.moe_layers:
                raise InputError(
                    f"routes are of decoder layers {step.moe_layers}, those of earlier steps of {self.moe_layers}: make"
                    " one report for each model"
                )
            self.moe_layers = step.moe_layers
            self.routes = routes if self.routes is None else self.routes + routes
        groups = step.responses.groups
        if groups is None:
            self.ungrouped.append(step.step)
        else:
            self.groups_of_one &= groups.width <= 1
        for name, given in applied.items():
            self.weights.setdefault(name, WeightFigures()).add(given, step.step)
        found = {name: self._add_pass(name, step, measure) for name, measure in measured.items()}
        self.steps.append(StepFigures(step.step, found, routes))

    def _add_pass(self, name: str, step: RunStep, measured: _Measured) -> Diagnostics:
        ratios, mask = measured.ratios, step.responses.mask
        self.tallies[name] = self.tallies[name] + measured.tally if name in self.tallies else measured.tally
        self.samples.setdefault(name, TokenSample()).add(ratios.rollout[mask], ratios.double[mask])
        figures = self.corrections.setdefault(name, {})
        for each in CORRECTIONS:
            if each.needs_groups and self.ungrouped:
                continue
            figures.setdefault(each.name, WeightFigures()).add(each.weigh(ratios)[mask], step.step)
        # The whole curve of every step would be most of what is kept of a long run.
        tails = measured.diagnostics.ratio_tails
        return replace(measured.diagnostics, ratio_tails={tau: tails[tau] for tau in self.taus})

    def summary(self, only: Sequence[str]) -> RunSummary:
        absent = [name for name in only if name not in self.seen]
        if absent:
            raise DataError(f"no step has the trainer passes {absent}; the run has {list(self.seen)}")
        if not self.tallies and self.left_out:
            first = self.left_out[0]
            raise DataError(
                f"no step is left: {len(self.left_out)} cannot be compared; the first, step {first.step}:"
                f" {first.reason}"
            )
        if not self.tallies:
            raise DataError(
                f"no response token in any of {len(self.empty)} steps: nothing was sampled, or the mask is inverted"
            )
        return RunSummary(
            steps=tuple(self.steps),
            empty_steps=tuple(self.empty),
            left_out=tuple(self.left_out),
            passes={
                name: PassFigures(Diagnostics.of(tally), self.samples[name], self._corrections(name))
                for name, tally in self.tallies.items()
            },
            taus=self.taus,
            routes=None if self.routes is None else self.routes.agreement(),
            moe_layers=self.moe_layers,
            weights=self.weights,
            groups_of_one=self.groups_of_one and not self.ungrouped,
            ungrouped_steps=tuple(self.ungrouped),
        )

    def _corrections(self, name: str) -> dict[str, WeightFigures]:
        # Of the steps that have groups only, weights would not compare with those of all steps.
        figures = self.corrections[name]
        return {each.name: figures[each.name] for each in CORRECTIONS if not (each.needs_groups and self.ungrouped)}


@dataclass(frozen=True, eq=False)
class _Measured:
    """Of one pass of one step: its log-ratios, their sums, and what follows from these."""

    ratios: LogRatios
    tally: Tally
    diagnostics: Diagnostics


def _measure(name: str, step: RunStep, taus: tuple[float, ...]) -> _Measured:
    try:
        ratios = step.log_ratios(name)
        tally = Tally.of(ratios, taus)
        return _Measured(ratios, tally, Diagnostics.of(tally))
    except InputError as error:
        raise InputError(f"trainer pass {name!r}: {error}") from error


def _applied(name: str, step: RunStep) -> Tensor:
    given = step.weights[name][step.responses.mask]
    if not bool((given.isfinite() & (given >= 0)).all()):
        raise InputError(f"weights.{name} of response tokens must be finite and not below 0")
    return given
