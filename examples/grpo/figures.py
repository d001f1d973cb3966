"""What a step says of itself: the figures of its line in the log, and the step that `r3 report` draws."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from examples.multi_turn_replay.rollout import Conversation
from router_replay.masks.agreement import RouteTally
from router_replay.mismatch import FilteredResponses, LogRatios, LossMetrics, Responses, diagnose
from router_replay.run import Dynamics, RunStep


def rollout_figures(played: Sequence[Conversation], filtered: FilteredResponses, group_size: int) -> dict[str, Any]:
    """Of all conversations, those that filters take included, by name, for the log."""
    lengths = [sum(each.sampled) for each in played]
    groups = torch.tensor([each.correct for each in played]).view(-1, group_size)
    return {
        "reward": sum(each.correct for each in played) / len(played),
        # Such groups have no advantages, and a step of nothing else has no gradient.
        "groups_of_one_reward": float((groups.all(1) | ~groups.any(1)).float().mean()),
        "response_tokens": sum(lengths) / len(played),
        "longest_response": max(lengths),
        "cut_off": sum(each.cut_off for each in played) / len(played),
        **filtered.flat(),
    }


def update_figures(
    ratios: LogRatios,
    *,
    entropies: Tensor,
    losses: Sequence[LossMetrics],
    norms: Sequence[float],
    drift: Sequence[RouteTally],
    replayed: Mapping[str, float],
) -> dict[str, Any]:
    """Of the conversations that were learnt from, by name, for the log.

    Args:
        ratios: of the old policy over the rollout's.
        entropies: of the old policy's distributions, as the tokens of `ratios`.
        losses: of all microbatches.
        norms: of the gradient at each update, before clipping.
        drift: of each training pass the routes that it took, against those when the old log-probabilities were made.
        replayed: `Replay.metrics`.
    """
    figures = {
        "entropy": float(entropies[ratios.responses.mask].double().mean()),
        # Not Python's max, for which NaN is sometimes less than a number.
        "gradient_norm": float(torch.tensor(norms).max()),
        **diagnose(ratios).flat(),
        **LossMetrics.total(losses).flat(),
        **replayed,
    }
    if drift:
        moved = functools.reduce(operator.add, drift).agreement()
        figures |= {
            "route_drift": moved.differing_routes,
            "route_overlap": sum(moved.overlap) / len(moved.overlap),
        }
    return figures


def dynamics_of(figures: Mapping[str, Any], filtered: FilteredResponses, num_tokens: int | None = None) -> Dynamics:
    """As `r3 report` takes them; without `num_tokens` of a step that filters left nothing of."""
    of_rollout: dict[str, Any] = {
        "num_responses": filtered.num_responses,
        "reward": figures["reward"],
        "response_length": figures["response_tokens"],
        "longest_response": figures["longest_response"],
        "cut_off": figures["cut_off"],
        "dropped_responses": filtered.num_responses - len(filtered.kept),
        "dropped_groups": filtered.num_groups - filtered.kept_groups,
    }
    if num_tokens is None:
        return Dynamics(**of_rollout)
    return Dynamics(
        **of_rollout,
        num_tokens=num_tokens,
        entropy=figures["entropy"],
        clipped=figures["loss/clipped_low"] + figures["loss/clipped_high"],
        dropped=figures["loss/dropped"],
        effective_share=figures["loss/weight_ess"],
        route_drift=figures.get("route_drift"),
        route_overlap=figures.get("route_overlap"),
        gradient_norm=figures["gradient_norm"],
    )


def run_step(number: int, ratios: LogRatios, weights: Mapping[str, Tensor], dynamics: Dynamics) -> RunStep:
    """The step as `r3 report` takes it; `weights` are the correction's, by its name."""
    return RunStep.of(
        number,
        rollout_logprobs=ratios.rollout,
        trainer_logprobs={"old": ratios.trainer},
        responses=ratios.responses,
        weights=weights,
        dynamics=dynamics,
    )


def packed_responses(played: Sequence[Conversation], groups: Sequence[int]) -> Responses:
    """Which tokens of conversations, one behind the other, the rollout sampled."""
    mask = torch.tensor([flag for each in played for flag in each.sampled])
    bounds = [0, *itertools.accumulate(len(each.token_ids) for each in played)]
    return Responses.packed(mask, bounds, groups)


def packed_values(rows: Sequence[Tensor], played: Sequence[Conversation]) -> Tensor:
    """Values `[B, T]` of microbatches, without their padding, as the tokens of all conversations, on the host."""
    of_each = zip((row for padded in rows for row in padded), played, strict=True)
    return torch.cat([row[: len(each.token_ids)] for row, each in of_each]).cpu()
