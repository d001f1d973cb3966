"""The way of one rollout's routes from the server's host table to the trainer: as servers go it now, and with masks."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import pybase64
import torch
from torch import Tensor

from router_replay.masks import RoutingGeometry, RoutingMasks, choose_codec, from_bytes, get_codec, load, to_bytes
from router_replay.masks.digest import token_digest
from router_replay.masks.stores.inline import InlineStore


def pipelines(geometry: RoutingGeometry, indices: Tensor) -> dict[str, Callable[[], Any]]:
    """Ways for routes `int32 [T, L, K]`, of which the first is the one to compare with.

    Each ends with `int32 [T, L, K]` at the trainer. The first two begin with a host table of int32, whose filling is
    not counted; those with masks begin with the staging buffer, `int16 [T, L, K]`, and pack it.
    """
    num_tokens = indices.shape[0]
    shape = tuple(indices.shape)
    # A request's KV slots lie anywhere in the table.
    slots = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0))
    in_slots = torch.empty_like(indices)
    in_slots[slots] = indices
    staged = in_slots.to(torch.int16)
    codec = choose_codec("auto", geometry)
    valid, digest = torch.ones(num_tokens, dtype=torch.bool), token_digest(range(num_tokens))

    def with_pythons_json() -> np.ndarray:
        routes = base64.b64encode(in_slots[slots].numpy().tobytes()).decode("ascii")
        answer = json.dumps({"meta_info": {"routed_experts": routes}})
        data = base64.b64decode(json.loads(answer)["meta_info"]["routed_experts"])
        return np.frombuffer(data, np.int32).reshape(shape)

    def as_sglang_sends() -> np.ndarray:
        routes = pybase64.b64encode(in_slots[slots].numpy().tobytes()).decode("utf-8")
        answer = orjson.dumps({"meta_info": {"routed_experts": routes}})
        data = pybase64.b64decode(json.loads(answer)["meta_info"]["routed_experts"])
        return np.frombuffer(data, np.int32).reshape(shape)

    def gathered() -> RoutingMasks:
        table = codec.pack(staged, geometry)
        rows = table.index_select(0, slots)
        return RoutingMasks(rows, valid, 0, geometry, codec.name, (), digest)

    def container() -> Tensor:
        return from_bytes(to_bytes(gathered())).indices()

    def container_by_layer() -> None:
        masks = from_bytes(to_bytes(gathered()))
        for layer_index in range(geometry.num_moe_layers):
            get_codec(masks.codec).unpack_layer(masks.rows, geometry, layer_index)

    def inline_handle() -> Tensor:
        answer = orjson.dumps({"meta_info": {"routing_masks": [InlineStore().put(gathered())]}})
        return load(json.loads(answer)["meta_info"]["routing_masks"][0]).indices()

    return {
        "int32, base64 and JSON of Python's library": with_pythons_json,
        "int32, pybase64 and orjson, as SGLang's server": as_sglang_sends,
        f"masks ({codec.name}), container": container,
        f"masks ({codec.name}), container, unpacked layer by layer": container_by_layer,
        f"masks ({codec.name}), inline handle in JSON": inline_handle,
    }
