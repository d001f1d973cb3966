"""A request is done: its rows become RoutingMasks, and a handle in its meta_info."""

from __future__ import annotations

from typing import Any

import torch

from routing_masks import RoutingMasks, token_digest
from routing_masks.stores import inline
from sglang_router_capture.recorder import Recorder

META_INFO_KEY = "routing_masks"
_HANDLE = "_router_capture_handle"


def collect(recorder: Recorder, req: Any, req_to_token_pool: Any) -> None:
    """Keep a handle of a finished request's masks on the request, before its KV slots are released.

    Args:
        req: `sglang.srt.managers.schedule_batch.Req`, finished, still holding its KV.
    """
    token_ids = [*req.origin_input_ids, *req.output_ids_through_stop]
    setattr(req, _HANDLE, inline.put(_masks(recorder, req, token_ids, req_to_token_pool)))


def handles(req: Any) -> list[dict[str, Any]]:
    """What goes into the request's meta_info with this output: its handle once, as soon as there is one."""
    handle = getattr(req, _HANDLE, None)
    if handle is None:
        return []
    delattr(req, _HANDLE)
    return [handle]


def _masks(recorder: Recorder, req: Any, token_ids: list[int], req_to_token_pool: Any) -> RoutingMasks:
    # The last sampled token was not fed back, so it has no KV and no row.
    end = len(token_ids) - 1
    start = min(req.routed_experts_start_len, end)
    slots = recorder.slots_of(req.kv.req_pool_idx, start, end, req_to_token_pool)
    rows, valid, versions = recorder.table.read(slots)
    # Rows that are not valid were computed by nobody: they neither begin nor end a run of one weight version.
    computed = valid.nonzero().flatten()
    numbers = versions[computed]
    begins = torch.ones_like(computed, dtype=torch.bool)
    begins[1:] = numbers[1:] != numbers[:-1]
    runs = zip(computed[begins].tolist(), numbers[begins].tolist(), strict=True)
    return RoutingMasks(
        rows=rows,
        valid=valid,
        start=start,
        geometry=recorder.geometry,
        codec=recorder.codec.name,
        weight_versions=tuple((start + row, recorder.version_name(number)) for row, number in runs),
        token_digest=token_digest(token_ids[:end]),
    )
