"""A step without its tokens: what the report shows of it, in numbers that are as many however many tokens there are."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.masks.agreement import RouteTally
from router_replay.mismatch.figures.diagnostics import DEFAULT_TAUS
from router_replay.mismatch.figures.tally import Tally
from router_replay.run.corrections import CORRECTIONS
from router_replay.run.dynamics import Dynamics
from router_replay.run.groups import group_numbers
from router_replay.run.joining import joined_dynamics, joined_routes, require_one_step, require_same
from router_replay.run.step import RunStep
from router_replay.run.token_sample import TokenSample
from router_replay.run.weight_tally import WeightTally

CURVE_TAUS = tuple(float(f"{1 + excess:.12g}") for excess in np.geomspace(1e-3, 1e4, 141))
"""Thresholds at which F(tau) is drawn; rounded, so that they are the same by every build of numpy."""

TAUS = tuple(sorted({*DEFAULT_TAUS, *CURVE_TAUS}))
"""Thresholds of which every step's tallies have F(tau)."""

OF_GROUPS = tuple(each.name for each in CORRECTIONS if each.needs_groups)
"""Corrections that compare the responses to one prompt."""


@dataclass(frozen=True, eq=False)
class PassTally:
    """Of one trainer pass: sums of all response tokens, some of them to be drawn, and weights by correction."""

    tally: Tally
    sample: TokenSample
    corrections: Mapping[str, WeightTally]

    def __add__(self, other: PassTally) -> PassTally:
        """Both batches', with the corrections that both have."""
        shared = {name: each + other.corrections[name] for name, each in self.corrections.items()
                  if name in other.corrections}  # fmt: skip
        return PassTally(self.tally + other.tally, self.sample + other.sample, shared)

    def without(self, corrections: Sequence[str]) -> PassTally:
        """The same but for some corrections' weights."""
        kept = {name: each for name, each in self.corrections.items() if name not in corrections}
        return replace(self, corrections=kept)


@dataclass(frozen=True, eq=False)
class StepTally:
    """Of one step.

    Attributes:
        step, moe_layers, dynamics, routes: as of `RunStep`.
        names: of the trainer's passes.
        num_tokens: response tokens; if there is none, there are no passes and weights here.
        passes: of those that were asked for, by name.
        weights: those that the trainer applied, by name.
        groups: int64 `[G]`, the prompts' ids, each once; None where they are not known.
        largest_group: most responses to one prompt, or 2 where that is known of prompts with more.
        split_groups: responses to one prompt were tallied apart, so that `OF_GROUPS` are not known.
        refused: why the step can be in no figure but its dynamics, or "". Then there are no passes and weights.
    """

    step: int
    names: tuple[str, ...] = ()
    num_tokens: int = 0
    passes: Mapping[str, PassTally] = field(default_factory=dict)
    weights: Mapping[str, WeightTally] = field(default_factory=dict)
    routes: RouteTally | None = None
    moe_layers: tuple[int, ...] | None = None
    groups: Tensor | None = None
    largest_group: int = 0
    split_groups: bool = False
    dynamics: Dynamics | None = None
    refused: str = ""

    @classmethod
    def of(cls, step: RunStep, *, passes: Sequence[str] = (), taus: Sequence[float] = (), part: int = 0) -> StepTally:
        """Of a step's tokens. What the mismatch functions refuse is told by `refused`.

        Args:
            passes: names of those to look at; by default all.
            taus: thresholds of F(tau) besides `TAUS`.
            part: of the step, so that each draws tokens of its own.
        """
        names = tuple(step.trainer_logprobs)
        count, prompts = int(step.responses.mask.sum()), step.responses.groups
        told: dict[str, Any] = {"step": step.step, "names": names, "num_tokens": count, "dynamics": step.dynamics}
        told |= {"routes": step.routes, "moe_layers": step.moe_layers}
        if prompts is not None:
            ids = group_numbers(step.responses.group_ids or ())
            told |= {"groups": ids.unique(), "largest_group": int(prompts.counts.max())}
        if count == 0:
            return cls(**told)
        every = tuple(sorted({*TAUS, *taus}))
        try:
            # All of a step before any of it is used: a step is in every figure or in none.
            measured = {
                name: _measured(name, step, every, seed=(step.step << 16) + part)
                for name in names
                if not passes or name in passes
            }
            return cls(**told, passes=measured, weights={name: _applied(name, step) for name in step.weights})
        except InputError as error:
            return cls(**told, refused=str(error))

    @classmethod
    def join(cls, parts: Sequence[StepTally]) -> StepTally:
        """One step from its parts; where `share_prompts`, without `OF_GROUPS`, of which sums of parts say nothing.

        Raises:
            InputError: parts that do not fit, as of `RunStep.join`.
        """
        if len(parts) == 1:
            return parts[0]
        require_one_step([part.step for part in parts])
        step = parts[0].step
        with_passes = [part for part in parts if part.names] or parts[:1]
        require_same(
            step,
            [
                {
                    "trainer_logprobs": sorted(part.names),
                    "group ids": "not given" if part.groups is None else "for its sequences",
                }
                for part in with_passes
            ],
        )
        with_tokens = [part for part in parts if part.num_tokens]
        refused = next((part.refused for part in with_tokens if part.refused), "")
        measured = [] if refused else with_tokens
        require_same(step, [{"weights": sorted(part.weights)} for part in measured])
        routes, moe_layers = joined_routes(step, [(part.routes, part.moe_layers) for part in parts])
        passes, weights = _summed([part.passes for part in measured]), _summed([part.weights for part in measured])
        known = [part.groups for part in with_passes if part.groups is not None]
        split = share_prompts(parts)
        if split:
            passes = {name: each.without(OF_GROUPS) for name, each in passes.items()}
        return cls(
            step=step,
            names=with_passes[0].names,
            num_tokens=sum(part.num_tokens for part in parts),
            passes=passes,
            weights=weights,
            routes=routes,
            moe_layers=moe_layers,
            groups=torch.cat(known).unique() if known else None,
            largest_group=max([2 * split, *(part.largest_group for part in parts)]),
            split_groups=split,
            dynamics=joined_dynamics([part.dynamics for part in parts]),
            refused=refused,
        )


def share_prompts(parts: Sequence[StepTally]) -> bool:
    """Whether some prompt has responses in several parts."""
    known = [part.groups for part in parts if part.groups is not None]
    return bool(known) and len(torch.cat(known).unique()) < sum(map(len, known))


def _summed[Part: (PassTally, WeightTally)](parts: Sequence[Mapping[str, Part]]) -> dict[str, Part]:
    first, *others = parts or [{}]
    return {
        name: functools.reduce(operator.add, [each[name] for each in others], tally) for name, tally in first.items()
    }


def _measured(name: str, step: RunStep, taus: tuple[float, ...], seed: int) -> PassTally:
    mask = step.responses.mask
    try:
        ratios = step.log_ratios(name)
        tally = Tally.of(ratios, taus)
    except InputError as error:
        raise InputError(f"trainer pass {name!r}: {error}") from error
    return PassTally(
        tally,
        TokenSample.of(ratios.rollout[mask], ratios.double[mask], seed=seed),
        {
            each.name: WeightTally.of(each.weigh(ratios)[mask])
            for each in CORRECTIONS
            if step.responses.groups is not None or not each.needs_groups
        },
    )


def _applied(name: str, step: RunStep) -> WeightTally:
    given = step.weights[name][step.responses.mask]
    if not bool((given.isfinite() & (given >= 0)).all()):
        raise InputError(f"weights.{name} of response tokens must be finite and not below 0")
    return WeightTally.of(given)
