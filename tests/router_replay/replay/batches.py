"""Recorded sequences of any lengths, and their padded batches."""

from __future__ import annotations

import torch
from torch import Tensor

from router_replay.masks import RoutingGeometry, RoutingMasks
from router_replay.replay import BatchLayout

# As many experts as no batch here has places, so that a mask of places cannot pass for one of experts.
GEOMETRY = RoutingGeometry(num_layers=4, moe_layers=(1, 3), num_experts=37, top_k=3)


def recorded(lengths: list[int], seed: int) -> tuple[list[Tensor], list[RoutingMasks], list[Tensor]]:
    """Token ids, masks and indices of sequences, some rows of which are not valid."""
    generator = torch.Generator().manual_seed(seed)
    ids, masks, indices = [], [], []
    for length in lengths:
        rows = max(length - 1, 0)
        ids.append(torch.randint(0, 1000, (length,), generator=generator))
        indices.append(torch.rand((rows, 2, 37), generator=generator).argsort(-1)[..., :3])
        valid = torch.rand(rows, generator=generator) < 0.7
        # Masks of a microbatch without any valid row are refused.
        valid[:1] |= ~valid.any()
        masks.append(
            RoutingMasks.from_indices(
                indices[-1], valid, start=0, geometry=GEOMETRY, codec="ordered", token_ids=ids[-1]
            )
        )
    return ids, masks, indices


def padded(ids: list[Tensor], side: str = "right", width: int | None = None) -> BatchLayout:
    width = max(len(each) for each in ids) if width is None else width
    batch = torch.zeros(len(ids), width, dtype=torch.long)
    for row, each in zip(batch, ids, strict=True):
        row[slice(len(each)) if side == "right" else slice(width - len(each), width)] = each
    return BatchLayout.padded(batch, [len(each) for each in ids], side=side)
