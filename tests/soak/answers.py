"""An answer of the server, with its routes, however they came."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from router_replay.masks import RoutingGeometry, masks_from_meta_info

ORIGINS = ("computed", "device", "host", "storage", "retracted")
"""Where the KV of a row came from; all rows of a request that was retracted count as that."""


@dataclass(frozen=True)
class Answer:
    """One sequence that the server returned.

    Attributes:
        token_ids: prompt and output.
        start: position of the first row.
        experts: `int64 [rows, L, K]`, of the MoE layers alone; -1 where a row is not valid.
        valid: `bool [rows]`.
        names: weight version of each row; None where the format has none.
        origins: `int64 [rows]`, index into `ORIGINS`.
        sent: `time.monotonic()` before the request.
        received: after the answer.
        meta_info: as the server sent it, without the routes.
    """

    token_ids: list[int]
    start: int
    experts: Tensor
    valid: Tensor
    names: list[str | None]
    origins: Tensor
    sent: float
    received: float
    meta_info: dict[str, Any]

    def __len__(self) -> int:
        return len(self.valid)


def read_answer(
    answer: dict[str, Any], prompt: Sequence[int], start: int, geometry: RoutingGeometry, sent: float, received: float
) -> Answer | None:
    """The answer with its routes in either format; None where it has no row to have.

    Raises:
        ValueError: tokens without routes, or routes that are not of the tokens that came with them.
    """
    token_ids = [*prompt, *answer["output_ids"]]
    meta = {key: value for key, value in answer["meta_info"].items() if key not in ("routing_masks", "routed_experts")}
    if not answer["output_ids"]:
        return None
    if answer["meta_info"].get("routed_experts") is not None:
        data = np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), np.int32)
        whole = torch.from_numpy(data.copy()).view(-1, geometry.num_layers, geometry.top_k)
        experts = whole[:, list(geometry.moe_layers)].long()
        valid = (experts >= 0).all(-1).all(-1)
        names: list[str | None] = [None] * len(experts)
    else:
        masks = masks_from_meta_info(answer["meta_info"])
        masks.check_tokens(token_ids)
        if masks.geometry != geometry or masks.start != start:
            raise ValueError(f"masks of {masks.geometry} from {masks.start}, asked for {geometry} from {start}")
        experts, valid = masks.indices().long(), masks.valid
        names = _names(masks.weight_versions, masks.start, masks.end)
    if len(experts) != len(token_ids) - 1 - start:
        raise ValueError(f"{len(experts)} rows from {start} of {len(token_ids)} tokens")
    origins = _origins(answer["meta_info"], len(token_ids) - 1)[start:]
    return Answer(token_ids, start, experts, valid, names, origins, sent, received, meta)


def _names(runs: Sequence[tuple[int, str]], start: int, end: int) -> list[str | None]:
    names: list[str | None] = [None] * (end - start)
    for (first, name), last in zip(runs, [*(first for first, _ in runs[1:]), end], strict=True):
        names[first - start : last - start] = [name] * (last - first)
    return names


def _origins(meta_info: dict[str, Any], end: int) -> Tensor:
    origins = torch.full((end,), ORIGINS.index("computed"))
    if meta_info["num_retractions"]:
        return torch.full((end,), ORIGINS.index("retracted"))
    details = meta_info.get("cached_tokens_details") or {"device": meta_info["cached_tokens"]}
    first = 0
    for tier in ("device", "host", "storage"):
        origins[first : first + details.get(tier, 0)] = ORIGINS.index(tier)
        first += details.get(tier, 0)
    return origins
