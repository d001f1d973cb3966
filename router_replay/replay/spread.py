"""Rows for places whose experts do not matter, such that they load all experts and their ranks alike."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from router_replay.masks import RoutingGeometry, get_codec


@functools.lru_cache(maxsize=8)
def spread_rows(codec: str, geometry: RoutingGeometry) -> Tensor:
    """E packed rows, `uint8 [E, row_bytes]`; places that take them in turn choose every expert equally often.

    Row i holds in MoE layer l the experts i + l + j * floor(E / K) modulo E, j = 0 to K - 1. A place's experts are thus
    as far apart as they can be, on as many expert-parallel ranks as there are (a rank holds neighbouring experts), and
    a few places load other experts in every layer.
    """
    experts, top_k = geometry.num_experts, geometry.top_k
    first = torch.arange(experts)[:, None, None] + torch.arange(geometry.num_moe_layers)[:, None]
    return get_codec(codec).pack((first + torch.arange(top_k) * (experts // top_k)) % experts, geometry)
