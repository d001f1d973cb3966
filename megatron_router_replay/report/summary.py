"""Everything that the report shows of a run, gathered step by step; tokens are not kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_router_replay.errors import MismatchInputError, RunFileError
from megatron_router_replay.mismatch.diagnostics import DEFAULT_TAUS, Diagnostics
from megatron_router_replay.mismatch.ratios import log_ratio
from megatron_router_replay.mismatch.routes import RouteAgreement, RouteTally
from megatron_router_replay.mismatch.tally import Tally
from megatron_router_replay.report.corrections import CORRECTIONS
from megatron_router_replay.report.records import RunStep
from megatron_router_replay.report.token_sample import TokenSample
from megatron_router_replay.report.weight_figures import WeightFigures

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


@dataclass(frozen=True, eq=False)
class RunSummary:
    """A run.

    Attributes:
        steps: those with response tokens, in the order of their numbers.
        empty_steps: numbers of those without.
        passes: by name, in the order of the first step.
        taus: thresholds of F(tau) that the table shows; the diagnostics of the passes have many more, for the curve.
        routes: the trainer's own routes against the rollout's, over all steps, or None.
        moe_layers: decoder layers of the routes, or None where they are not known.
        weights: those that the trainer applied, by name.
        groups_of_one: no prompt has two responses.
    """

    steps: tuple[StepFigures, ...]
    empty_steps: tuple[int, ...]
    passes: dict[str, PassFigures]
    taus: tuple[float, ...]
    routes: RouteAgreement | None
    moe_layers: tuple[int, ...] | None
    weights: dict[str, WeightFigures]
    groups_of_one: bool


def summarize(
    steps: Iterable[RunStep], *, passes: Sequence[str] = (), taus: Sequence[float] = DEFAULT_TAUS
) -> RunSummary:
    """Gather a run's figures.

    Args:
        steps: in the order of their numbers.
        passes: names of the trainer's passes to look at; by default all.
        taus: thresholds of F(tau) to tell in numbers, above 1.

    Raises:
        RunFileError: no step, no response token in any, a pass that no step has, steps with routes of other layers, or
            log-probabilities that the mismatch functions refuse (named with their step and pass).
    """
    gathered = _Gathered(tuple(taus))
    for step in steps:
        try:
            gathered.add(step, passes)
        except MismatchInputError as error:
            raise RunFileError(f"step {step.step}: {error}") from error
    return gathered.summary(passes)


class _Gathered:
    def __init__(self, taus: tuple[float, ...]) -> None:
        self.taus = taus
        self.curve = tuple(sorted({*taus, *CURVE_TAUS}))
        self.steps: list[StepFigures] = []
        self.empty: list[int] = []
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
        if not bool(step.response_mask.any()):
            self.empty.append(step.step)
            return
        found = {name: self._add_pass(name, step) for name in step.trainer_logprobs if not only or name in only}
        for name, weights in step.weights.items():
            given = weights[step.response_mask]
            if not bool((given.isfinite() & (given >= 0)).all()):
                raise MismatchInputError(f"weights.{name} of response tokens must be finite and not below 0")
            self.weights.setdefault(name, WeightFigures()).add(given, step.step)
        routes = step.routes if step.routes is not None and int(step.routes.tokens) else None
        if routes is not None:
            if self.routes is not None and step.moe_layers != self.moe_layers:
                raise MismatchInputError(
                    f"routes are of decoder layers {step.moe_layers}, those of earlier steps of {self.moe_layers}: make"
                    " one report for each model"
                )
            self.moe_layers = step.moe_layers
            self.routes = routes if self.routes is None else self.routes + routes
        self.groups_of_one &= step.responses.prompts.width <= 1
        self.steps.append(StepFigures(step.step, found, routes))

    def _add_pass(self, name: str, step: RunStep) -> Diagnostics:
        trainer, rollout, responses = step.trainer_logprobs[name], step.rollout_logprobs, step.responses
        try:
            tally = Tally.of(trainer, rollout, responses, self.curve)
            diagnostics = Diagnostics.of(tally)
            ratio = log_ratio(trainer, rollout, responses, at_least=torch.float64)[responses.mask]
        except MismatchInputError as error:
            raise MismatchInputError(f"trainer pass {name!r}: {error}") from error
        self.tallies[name] = self.tallies[name] + tally if name in self.tallies else tally
        self.samples.setdefault(name, TokenSample()).add(rollout[responses.mask], ratio)
        figures = self.corrections.setdefault(name, {each.name: WeightFigures() for each in CORRECTIONS})
        for each in CORRECTIONS:
            weights = each.weigh(trainer, rollout, responses)
            figures[each.name].add(weights[responses.mask], step.step)
        # The whole curve of every step would be most of what is kept of a long run.
        return replace(diagnostics, ratio_tails={tau: diagnostics.ratio_tails[tau] for tau in self.taus})

    def summary(self, only: Sequence[str]) -> RunSummary:
        absent = [name for name in only if name not in self.seen]
        if absent:
            raise RunFileError(f"no step has the trainer passes {absent}; the run has {list(self.seen)}")
        if not self.tallies:
            raise RunFileError(
                f"no response token in any of {len(self.empty)} steps: nothing was sampled, or the mask is inverted"
            )
        return RunSummary(
            steps=tuple(self.steps),
            empty_steps=tuple(self.empty),
            passes={
                name: PassFigures(Diagnostics.of(tally), self.samples[name], self.corrections[name])
                for name, tally in self.tallies.items()
            },
            taus=self.taus,
            routes=None if self.routes is None else self.routes.agreement(),
            moe_layers=self.moe_layers,
            weights=self.weights,
            groups_of_one=self.groups_of_one,
        )
