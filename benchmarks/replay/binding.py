"""Host time of binding a microbatch, and what it holds on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.interleaved import Seconds, median_seconds
from benchmarks.mask_codec.models import MODELS, geometry_of
from benchmarks.replay.models import build
from megatron_router_replay import BatchLayout, Replay, attach
from router_replay.masks import RoutingMasks
from router_replay.replay import MicrobatchRoutes

MODEL = "Qwen3-30B-A3B"
FIRST, SECOND = "first use: layout, placement, binding", "second use: binding of the placement"


class _NoPass(Exception):
    """Leaves a block without the forward pass that its end would ask for."""


def host_times(num_tokens: int, rounds: int) -> tuple[dict[str, Seconds], dict[str, float]]:
    """Medians of both uses of a pack of four sequences on all layers of `MODEL`, and bytes per token on the device."""
    sequences = [torch.randint(0, 512, (length,)) for length in _lengths(num_tokens)]
    masks = [_masks(ids) for ids in sequences]
    pack = torch.cat(sequences)[None]
    cu_seqlens = torch.tensor([0, *map(len, sequences)]).cumsum(0).to(torch.int32)
    # Of the routers' inputs nothing is computed here.
    model = build(MODEL, MODELS[MODEL][0], 16, experts=False)
    with attach(model) as replay:
        placement = replay.place(masks, BatchLayout.packed(pack, cu_seqlens))
        runs: dict[str, Callable[[], Any]] = {
            FIRST: lambda: _bind(replay, masks, BatchLayout.packed(pack, cu_seqlens)),
            SECOND: lambda: _bind(replay, placement),
        }
        return median_seconds(runs, rounds), bytes_per_token(placement)


def bytes_per_token(placement: MicrobatchRoutes) -> dict[str, float]:
    """What a placement holds on the device, and what RouterReplay's targets of the same layers hold."""
    ids = placement.called_ids
    rest = [placement.own_places, placement.sample, *([] if ids is None else [ids])]
    geometry = placement.geometry
    return {
        "rows": placement.rows.nbytes / placement.num_places,
        "all else": sum(each.nbytes for each in rest) / placement.num_places,
        "stock RouterReplay's int64 targets": geometry.num_moe_layers * geometry.top_k * 8,
    }


def _bind(replay: Replay, *what: Any) -> None:
    with contextlib.suppress(_NoPass), replay.microbatch(*what):
        raise _NoPass


def _lengths(num_tokens: int) -> Iterator[int]:
    for parts in (4, 3, 2, 1):
        # The first is the shortest.
        length = num_tokens // parts - (16 if parts > 1 else 0)
        yield length
        num_tokens -= length


def _masks(token_ids: Tensor) -> RoutingMasks:
    geometry = geometry_of(MODEL)
    shape = len(token_ids) - 1, geometry.num_moe_layers, geometry.num_experts
    return RoutingMasks.from_indices(
        torch.rand(shape).topk(geometry.top_k, sorted=False).indices,
        torch.ones(shape[0], dtype=torch.bool),
        start=0,
        geometry=geometry,
        codec="auto",
        token_ids=token_ids,
    )
