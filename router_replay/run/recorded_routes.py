"""Routes of whole sequences, from the masks that the rollout recorded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.masks import RoutingMasks


def recorded_routes(parts: Sequence[RoutingMasks], num_tokens: int) -> tuple[Tensor, Tensor]:
    """Routes of one sequence of `num_tokens` tokens from its masks: whole, or a delta for each turn.

    Returns:
        int32 `[num_tokens, L, K]` and bool `[num_tokens]`, False where no valid row was recorded.

    Raises:
        InputError: masks that end after the sequence, or two with rows for one token.
        router_replay.errors.PairingError: masks of different models.
    """
    geometry = parts[0].geometry
    routes = torch.full((num_tokens, len(geometry.moe_layers), geometry.top_k), -1, dtype=torch.int32)
    recorded = torch.zeros(num_tokens, dtype=torch.bool)
    covered = torch.zeros(num_tokens, dtype=torch.bool)
    for number, masks in enumerate(parts):
        geometry.require_same(masks.geometry, "masks 0", f"masks {number}")
        if masks.end > num_tokens:
            raise InputError(
                f"masks cover tokens [{masks.start}, {masks.end}), but the sequence has {num_tokens} tokens: give the"
                " log-probabilities of the whole sequence, prompt included, with its own masks"
            )
        rows = slice(masks.start, masks.end)
        if bool(covered[rows].any()):
            raise InputError(f"masks {number} has rows for tokens that masks before it have already")
        covered[rows] = True
        routes[rows], recorded[rows] = masks.indices().cpu(), masks.valid.cpu()
    return routes, recorded
