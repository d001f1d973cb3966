"""Importance weights that are divided by their own mean over the batch, or over each prompt's group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.log_ratios import LogRatios, require_log_ratios


def self_normalized_weights(
    ratios: LogRatios,
    *,
    level: Literal["token", "sequence"] = "sequence",
    over: Literal["batch", "group"] = "group",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Self-normalised importance sampling, SNIS: w_i = n rho_i / sum_j rho_j over a set of n samples.

    The weights of a set have mean 1, whatever the scale of the ratios; no weight exceeds n. The estimate
    mean(w f) is biased by O(1/n) and consistent, and invariant to a constant factor in the ratios, such as an unknown
    normalising constant of a masked policy. Source: Owen, "Monte Carlo theory, methods and examples" (2013),
    section 9.2. Every sequence of a set weighs the same; in a mean over tokens long sequences count more. Truncating
    first and then normalising is `w / mean` of TIS and not done here.

    Args:
        level: samples are response tokens, or sequences that have a response token.
        over: the set is the whole batch, or the responses to one prompt.
        process_group: data-parallel ranks whose batches are one batch; every rank calls, with ratios that were made
            with the group. Groups may not be split over ranks.

    Returns:
        Detached weights, tokens' shape. A set whose every ratio is 0 gets weights 0.

    Raises:
        InputError: unknown level or set, a process group with `over="group"`, with other ranks of the context group or
            that the ratios were not made with; or responses whose prompts are not known.
    """
    require_log_ratios(ratios)
    if level not in ("token", "sequence") or over not in ("batch", "group"):
        raise InputError(f"level must be 'token' or 'sequence' and over 'batch' or 'group': {level!r}, {over!r}")
    if over == "group" and process_group is not None:
        raise InputError("a process group joins batches: with over='group' every prompt's group is on one rank")
    # In float64: of a logarithm of some tens, few digits would be left for the weight. No weight is above n.
    responses, ratio = ratios.responses, ratios.double
    _, context_group = ratios.groups_with(process_group)
    by_token = level == "token"
    ratio = ratio.flatten() if by_token else responses.sum(ratio)
    counted = responses.mask.flatten() if by_token else responses.lengths > 0
    if over == "group":
        sets, num_sets = responses.prompts.segment, responses.prompts.num_segments
        sets = responses.tokens.of_items(sets) if by_token else sets
    else:
        sets, num_sets = torch.zeros(len(ratio), dtype=torch.int64, device=ratio.device), 1
    # Of a context group every rank has all sequences, and a part of the tokens.
    groups = [context_group if by_token else None, process_group]
    log_mean = _log_mean(ratio, counted, sets, num_sets, [group for group in groups if group is not None])
    # A set whose every ratio is 0 has no mean.
    weights = (ratio - log_mean[sets]).exp().masked_fill(~counted | (ratio == -torch.inf), 0)
    weights = weights.view(responses.mask.shape) if by_token else responses.expand(weights)
    return weights.to(ratios.token.dtype)


def _log_mean(
    ratio: Tensor, counted: Tensor, set_of: Tensor, num_sets: int, groups: Sequence[dist.ProcessGroup]
) -> Tensor:
    """Logarithm of the mean of exp(ratio) over the counted items of each set, `[num_sets]`."""
    ratio = ratio.masked_fill(~counted, -torch.inf)
    highest = ratio.new_full((num_sets,), -torch.inf).scatter_reduce(0, set_of, ratio, "amax")
    for group in groups:
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    # A set without any weight has NaN here; none of its items is used.
    sums = ratio.new_zeros(2, num_sets)
    sums[0].index_add_(0, set_of, (ratio - highest[set_of]).exp())
    sums[1].index_add_(0, set_of, counted.double())
    for group in groups:
        dist.all_reduce(sums, group=group)
    return highest + sums[0].log() - sums[1].clamp(min=1).log()
