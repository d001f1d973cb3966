"""Everything that the report shows of a run, gathered step by step; tokens are not kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from router_replay.errors import DataError, InputError
from router_replay.masks.agreement import RouteAgreement, RouteTally
from router_replay.mismatch.figures.diagnostics import DEFAULT_TAUS, Diagnostics
from router_replay.mismatch.figures.tally import Tally
from router_replay.report.weight_figures import WeightFigures
from router_replay.run.dynamics import Dynamics
from router_replay.run.step import RunStep
from router_replay.run.step_tally import OF_GROUPS, StepTally
from router_replay.run.token_sample import TokenSample


@dataclass(frozen=True, eq=False)
class StepFigures:
    """Of one step: its number, diagnostics by trainer pass, how routes differ, if the step has them, and by the name of
    the weights that the trainer applied their effective sample size.
    """

    step: int
    passes: dict[str, Diagnostics]
    routes: RouteTally | None
    effective_shares: dict[str, float] = field(default_factory=dict)


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
        split_steps: numbers of those whose prompts' responses were tallied apart, for which the same holds.
        dynamics: what steps say of training, by their numbers in order; steps that are left out have it, too.
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
    split_steps: tuple[int, ...]
    dynamics: dict[int, Dynamics]


def summarize(
    steps: Iterable[RunStep | StepTally], *, passes: Sequence[str] = (), taus: Sequence[float] = DEFAULT_TAUS
) -> RunSummary:
    """Gather a run's figures. Steps that the mismatch functions refuse are left out and named, with the reason.

    Args:
        steps: in the order of their numbers; tallies as of `router_replay.run.reading.read_tallies` with these `taus`.
        passes: names of the trainer's passes to look at; by default all.
        taus: thresholds of F(tau) to tell in numbers, above 1.

    Raises:
        DataError: no step, no response token in any, a pass that no step has, steps with routes of other layers, or
            no step that is not left out.
    """
    gathered = _Gathered(tuple(taus))
    for step in steps:
        try:
            tally = step if isinstance(step, StepTally) else StepTally.of(step, passes=passes, taus=taus)
            gathered.add(tally, passes)
        except InputError as error:
            raise DataError(f"step {step.step}: {error}") from error
    return gathered.summary(passes)


class _Gathered:
    def __init__(self, taus: tuple[float, ...]) -> None:
        self.taus = taus
        self.steps: list[StepFigures] = []
        self.empty: list[int] = []
        self.left_out: list[LeftOut] = []
        self.ungrouped: list[int] = []
        self.split: list[int] = []
        self.dynamics: dict[int, Dynamics] = {}
        self.seen: dict[str, None] = {}
        self.tallies: dict[str, Tally] = {}
        self.samples: dict[str, TokenSample] = {}
        self.corrections: dict[str, dict[str, WeightFigures]] = {}
        self.weights: dict[str, WeightFigures] = {}
        self.routes: RouteTally | None = None
        self.moe_layers: tuple[int, ...] | None = None
        self.groups_of_one = True

    def add(self, step: StepTally, only: Sequence[str]) -> None:
        self.seen |= dict.fromkeys(step.names)
        if step.dynamics is not None:
            self.dynamics[step.step] = step.dynamics
        if step.num_tokens == 0:
            # Of a step that was only evaluated nothing is left out.
            if step.names:
                self.empty.append(step.step)
            return
        if step.refused:
            self.left_out.append(LeftOut(step.step, step.refused))
            return
        passes = {name: each for name, each in step.passes.items() if not only or name in only}
        try:
            diagnostics = {name: _diagnosed(name, each.tally) for name, each in passes.items()}
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
        if step.groups is None:
            self.ungrouped.append(step.step)
        else:
            self.groups_of_one &= step.largest_group <= 1
        if step.split_groups:
            self.split.append(step.step)
        for name, applied in step.weights.items():
            self.weights.setdefault(name, WeightFigures()).add(applied, step.step)
        for name, each in passes.items():
            self.tallies[name] = self.tallies[name] + each.tally if name in self.tallies else each.tally
            self.samples[name] = self.samples[name] + each.sample if name in self.samples else each.sample
            figures = self.corrections.setdefault(name, {})
            for title, weights in each.corrections.items():
                figures.setdefault(title, WeightFigures()).add(weights, step.step)
        # The whole curve of every step would be most of what is kept of a long run.
        kept = {
            name: replace(found, ratio_tails={tau: found.ratio_tails[tau] for tau in (*self.taus, 2.0)})
            for name, found in diagnostics.items()
        }
        shares = {name: applied.effective_share for name, applied in step.weights.items()}
        self.steps.append(StepFigures(step.step, kept, routes, shares))

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
            split_steps=tuple(self.split),
            dynamics=self.dynamics,
        )

    def _corrections(self, name: str) -> dict[str, WeightFigures]:
        # Of the steps that have groups only, weights would not compare with those of all steps.
        absent = OF_GROUPS if self.ungrouped or self.split else ()
        return {title: figures for title, figures in self.corrections[name].items() if title not in absent}


def _diagnosed(name: str, tally: Tally) -> Diagnostics:
    try:
        return Diagnostics.of(tally)
    except InputError as error:
        raise InputError(f"trainer pass {name!r}: {error}") from error
