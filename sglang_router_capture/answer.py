"""A request's rows: kept when it is retracted, made RoutingMasks when it is done, a handle in its meta_info."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from router_replay.masks import RoutingMasks, token_digest
from sglang_router_capture.recorder import Recorder

META_INFO_KEY = "routing_masks"
_HANDLE = "_router_capture_handle"
_KEPT = "_router_capture_kept"


@dataclass(frozen=True)
class _Rows:
    """Rows of a request's tokens [start, n - 1).

    Attributes:
        token_ids: all n tokens.
        rows: `uint8 [n - 1 - start, row_bytes]`.
        valid: `bool [n - 1 - start]`.
        versions: `int32 [n - 1 - start]`.
    """

    token_ids: list[int]
    rows: Tensor
    valid: Tensor
    versions: Tensor


def keep(recorder: Recorder, req: Any, req_to_token_pool: Any) -> None:
    """Keep the rows of a request that is about to lose its KV slots and will be computed anew.

    The log-probabilities of the tokens sampled so far are returned, so the routes that gave them are, too, and not
    those of the prefill that follows.

    Args:
        req: `sglang.srt.managers.schedule_batch.Req`, retracted, still holding its KV.
    """
    kept: _Rows | None = getattr(req, _KEPT, None)
    token_ids = [*req.origin_input_ids, *req.output_ids]
    # A new token was sampled: every token before it is computed, and its pass in the table. Without one the request is
    # retracted in the middle of a prefill, and its slots say nothing yet.
    if len(req.output_ids) > 0 and (kept is None or len(token_ids) > len(kept.token_ids)):
        rows = _rows(recorder, req, token_ids, req_to_token_pool)
        setattr(req, _KEPT, rows)
        recorder.counts.kept += len(rows.valid)


def collect(recorder: Recorder, req: Any, req_to_token_pool: Any) -> None:
    """Put a finished request's masks into the store, before its KV slots are released, and keep their handle on it.

    Args:
        req: `sglang.srt.managers.schedule_batch.Req`, finished, still holding its KV.
    """
    token_ids = [*req.origin_input_ids, *req.output_ids_through_stop]
    _put(recorder, req, _rows(recorder, req, token_ids, req_to_token_pool))


def has_kept(req: Any) -> bool:
    """Whether rows of a retracted request were kept. Also for what is no request."""
    return getattr(req, _KEPT, None) is not None


def collect_kept(recorder: Recorder, req: Any) -> None:
    """Put the masks of a request that ends without KV slots into the store, and keep their handle on it.

    Args:
        req: `sglang.srt.managers.schedule_batch.Req` whose rows were kept when it was retracted, aborted since. It has
            sampled nothing in between.
    """
    _put(recorder, req, getattr(req, _KEPT))


def handles(req: Any) -> list[dict[str, Any]]:
    """What goes into the request's meta_info with this output: its handle once, or a ticket for it."""
    handle = getattr(req, _HANDLE, None)
    if handle is None:
        return []
    delattr(req, _HANDLE)
    return [handle]


def _rows(recorder: Recorder, req: Any, token_ids: list[int], req_to_token_pool: Any) -> _Rows:
    # The last sampled token was not fed back, so it has no KV and no row.
    slots = recorder.slots_of(req.kv.req_pool_idx, _start(req, token_ids), len(token_ids) - 1, req_to_token_pool)
    rows, valid, versions = recorder.table.read(slots)
    kept: _Rows | None = getattr(req, _KEPT, None)
    # A request with input embeddings forgets what it sampled, and its tokens are others then.
    if kept is not None and token_ids[: len(kept.token_ids)] == kept.token_ids:
        first = len(kept.valid)
        rows[:first] = torch.where(kept.valid[:, None], kept.rows, rows[:first])
        versions[:first] = torch.where(kept.valid, kept.versions, versions[:first])
        valid[:first] |= kept.valid
    return _Rows(token_ids, rows, valid, versions)


def _put(recorder: Recorder, req: Any, found: _Rows) -> None:
    recorder.counts.count_returned(found.valid, found.versions)
    # Gathered here, since the slots are about to be given away; all else may be done later, and elsewhere.
    make = partial(_masks, recorder, _start(req, found.token_ids), found)
    handle = recorder.store.put(make()) if recorder.writer is None else recorder.writer.submit(make, found.rows.nbytes)
    setattr(req, _HANDLE, handle)


def _masks(recorder: Recorder, start: int, found: _Rows) -> RoutingMasks:
    # Rows that are not valid were computed by nobody: they neither begin nor end a run of one weight version.
    computed = found.valid.nonzero().flatten()
    numbers = found.versions[computed]
    begins = torch.ones_like(computed, dtype=torch.bool)
    begins[1:] = numbers[1:] != numbers[:-1]
    runs = zip(computed[begins].tolist(), numbers[begins].tolist(), strict=True)
    return RoutingMasks(
        rows=found.rows,
        valid=found.valid,
        start=start,
        geometry=recorder.geometry,
        codec=recorder.codec.name,
        weight_versions=tuple((start + row, recorder.weight_versions.name(number)) for row, number in runs),
        token_digest=token_digest(found.token_ids[:-1]),
    )


def _start(req: Any, token_ids: list[int]) -> int:
    return min(req.routed_experts_start_len, len(token_ids) - 1)
