"""Requests to the servers under test."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpu_engines.sglang.server import Server
from router_replay.masks import RoutingMasks, masks_from_meta_info

VOCABULARY = 103
END = 1


def prompt(seed: int, length: int) -> list[int]:
    """Token ids without meaning, the same for the same seed; no two seeds share a prefix worth caching."""
    rng = random.Random(seed)
    return [rng.randrange(VOCABULARY) for _ in range(length)]


def flush(server: Server) -> None:
    """Empty the prefix cache."""
    import urllib.request

    with urllib.request.urlopen(urllib.request.Request(server.url + "/flush_cache", method="POST"), timeout=60):
        return


def generate(server: Server, input_ids: list[int], max_new_tokens: int, **fields: Any) -> dict[str, Any]:
    """A greedy request that asks for its routes and does not stop early."""
    sampling = {"temperature": 0, "ignore_eos": True, **fields.pop("sampling_params", {})}
    return server.generate(input_ids, max_new_tokens, sampling_params=sampling, return_routed_experts=True, **fields)


def masks_of(answer: dict[str, Any], input_ids: list[int]) -> RoutingMasks:
    """The answer's masks, checked against its tokens."""
    masks = masks_from_meta_info(answer["meta_info"])
    masks.check_tokens(input_ids + answer["output_ids"])
    return masks


def upstream_routes(answer: dict[str, Any], num_layers: int, top_k: int) -> Tensor:
    """`meta_info["routed_experts"]` as `int32 [tokens, num_layers, top_k]`."""
    data = base64.b64decode(answer["meta_info"]["routed_experts"])
    return torch.from_numpy(np.frombuffer(data, np.int32).reshape(-1, num_layers, top_k).copy())
