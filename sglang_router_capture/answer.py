"""A request's rows: kept when it is retracted, made RoutingMasks when it is done, a handle in its meta_info."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from router_replay.masks import RoutingMasks, token_digest
from sglang_router_capture.recorder import Recorder
from sglang_router_capture.slot_table import SlotRows

META_INFO_KEY = "routing_masks"
_HANDLE = "_router_capture_handle"
_KEPT = "_router_capture_kept"


@dataclass(frozen=True)
class _Rows:
    """Rows of a request's tokens [start, n - 1).

    Attributes:
        token_ids: `int64 [n]`, all of them.
        rows: `uint8 [n - 1 - start, row_bytes]`.
        valid: `bool [n - 1 - start]`.
        versions: `int32 [n - 1 - start]`.
    """

    token_ids: np.ndarray
    rows: Tensor
    valid: Tensor
    versions: Tensor

    def begins(self, token_ids: np.ndarray) -> bool:
        """Whether these are rows of the first tokens of `token_ids`."""
        return np.array_equal(token_ids[: len(self.token_ids)], self.token_ids)


def keep(recorder: Recorder, req: Any, req_to_token_pool: Any) -> None:
    """Keep the rows of a request that is about to lose its KV slots and will be computed anew.

    The log-probabilities of the tokens sampled so far are returned, so the routes that gave them are, too, and not
    those of the prefill that follows.

    Args:
        req: `sglang.srt.managers.schedule_batch.Req`, retracted, still holding its KV.
    """
    kept: _Rows | None = getattr(req, _KEPT, None)
    token_ids = _token_ids(req.origin_input_ids, req.output_ids)
    # A new token was sampled: every token before it is computed, and its pass in the table. Without one the request is
    # retracted in the middle of a prefill, and its slots say nothing yet.
    if len(req.output_ids) > 0 and (kept is None or len(token_ids) > len(kept.token_ids)):
        # At once: its slots go to others now.
        found = recorder.table.read(_slots(recorder, req, token_ids, req_to_token_pool))
        rows = _rows(token_ids, found, kept)
        setattr(req, _KEPT, rows)
        recorder.counts.kept += len(rows.valid)


def collect(recorder: Recorder, req: Any, req_to_token_pool: Any) -> None:
    """Put a finished request's masks into the store, before its KV slots are released, and keep their handle on it.

    Args:
        req: `sglang.srt.managers.schedule_batch.Req`, finished, still holding its KV.
    """
    token_ids = _token_ids(req.origin_input_ids, req.output_ids_through_stop)
    # Not copied here: of a long request that takes milliseconds, and others may end in the same step.
    read = recorder.table.read_later(_slots(recorder, req, token_ids, req_to_token_pool))
    start, kept = _start(req, token_ids), getattr(req, _KEPT, None)
    num_bytes = read.num_bytes + token_ids.nbytes + (0 if kept is None else kept.rows.nbytes)
    _put(recorder, req, lambda: _masks(recorder, start, _rows(token_ids, read.gather(), kept)), num_bytes)


def has_kept(req: Any) -> bool:
    """Whether rows of a retracted request were kept. Also for what is no request."""
    return getattr(req, _KEPT, None) is not None


def collect_kept(recorder: Recorder, req: Any) -> None:
    """Put the masks of a request that ends without KV slots into the store, and keep their handle on it.

    Args:
        req: `sglang.srt.managers.schedule_batch.Req` whose rows were kept when it was retracted, aborted since. It has
            sampled nothing in between.
    """
    kept: _Rows = getattr(req, _KEPT)
    _put(
        recorder,
        req,
        partial(_masks, recorder, _start(req, kept.token_ids), kept),
        kept.rows.nbytes + kept.token_ids.nbytes,
    )


def handles(req: Any) -> list[dict[str, Any]]:
    """What goes into the request's meta_info with this output: its handle once, or a ticket for it."""
    handle = getattr(req, _HANDLE, None)
    if handle is None:
        return []
    delattr(req, _HANDLE)
    return [handle]


def _token_ids(*parts: Sequence[int]) -> np.ndarray:
    # SGLang has arrays of 64 bits, to which it appends: a copy, and not one of Python's integers.
    return np.concatenate([np.asarray(part, np.int64) for part in parts])


def _slots(recorder: Recorder, req: Any, token_ids: np.ndarray, req_to_token_pool: Any) -> Tensor:
    # The last sampled token was not fed back, so it has no KV and no row.
    return recorder.slots_of(req.kv.req_pool_idx, _start(req, token_ids), len(token_ids) - 1, req_to_token_pool)


def _rows(token_ids: np.ndarray, found: SlotRows, kept: _Rows | None) -> _Rows:
    rows, valid, versions = found
    # A request with input embeddings forgets what it sampled, and its tokens are others then.
    if kept is not None and kept.begins(token_ids):
        first = len(kept.valid)
        # New tensors: those that were found may be made under inference mode, and may not be changed outside of it.
        rows = torch.cat([torch.where(kept.valid[:, None], kept.rows, rows[:first]), rows[first:]])
        versions = torch.cat([torch.where(kept.valid, kept.versions, versions[:first]), versions[first:]])
        valid = torch.cat([kept.valid | valid[:first], valid[first:]])
    return _Rows(token_ids, rows, valid, versions)


def _put(recorder: Recorder, req: Any, make: Callable[[], RoutingMasks], num_bytes: int) -> None:
    handle = recorder.store.put(make()) if recorder.writer is None else recorder.writer.submit(make, num_bytes)
    setattr(req, _HANDLE, handle)


def _masks(recorder: Recorder, start: int, found: _Rows) -> RoutingMasks:
    recorder.counts.count_returned(found.valid, found.versions)
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


def _start(req: Any, token_ids: np.ndarray) -> int:
    return min(req.routed_experts_start_len, len(token_ids) - 1)
