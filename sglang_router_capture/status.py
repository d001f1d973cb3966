"""What a scheduler's recorder says of itself."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import asdict
from typing import Any

from router_replay import __version__
from router_replay.masks.codecs.ops import MISSING_KERNELS
from sglang_router_capture.hooks.registry import HOOKS
from sglang_router_capture.ledger import LEDGER
from sglang_router_capture.recorder import Recorder
from sglang_router_capture.slot_table import SlotTable


def status(recorder: Recorder) -> dict[str, Any]:
    """Plain values for JSON and msgpack. Called on the scheduler thread, between passes.

    Sizes are those of the buffers, not of what they hold: none of them grows.
    """
    geometry = recorder.geometry
    return {
        "pid": os.getpid(),
        "capturer": type(recorder).__name__,
        "versions": {"rollout-routing-replay": __version__, LEDGER.distribution: _release()},
        "format": recorder.options.format,
        "codec": recorder.codec.name,
        "geometry": {
            "num_layers": geometry.num_layers,
            "moe_layers": list(geometry.moe_layers),
            "num_experts": geometry.num_experts,
            "top_k": geometry.top_k,
        },
        "row_bytes": recorder.codec.row_bytes(geometry),
        "missing_kernels": dict(MISSING_KERNELS),
        # A server in which one of them is not in place does not start.
        "hooks": sorted(HOOKS),
        "tables": {name: _table(table) for name, table in tables(recorder).items()},
        "staging_bytes": recorder.device_cache.buffer.nbytes,
        "log": len(recorder.log),
        "weights": {
            "present": recorder.weight_versions.name(recorder.weight_versions.present),
            "names": len(recorder.weight_versions),
        },
        "rows": rows(recorder),
        "store": {"url": recorder.options.store, **stored(recorder)},
    }


def tables(recorder: Recorder) -> dict[str, SlotTable]:
    """The recorder's tables, by whose slots they have rows of."""
    found = {"device": recorder.table}
    if recorder.hicache is not None:
        found["host"] = recorder.hicache.table
    return found


def table_bytes(table: SlotTable) -> int:
    """Host memory of a table."""
    return sum(part.nbytes for part in (table.rows, table.valid, table.versions, table.read_by))


def rows(recorder: Recorder) -> dict[str, int]:
    """Counts of rows since the start, by what became of them."""
    moved = {} if recorder.hicache is None else asdict(recorder.hicache.counters)
    return {**asdict(recorder.counts), **moved}


def stored(recorder: Recorder) -> dict[str, int]:
    """Requests since the start by what became of their masks, and the rows that are on their way into the store."""
    counts = {} if recorder.writer is None else asdict(recorder.writer.counts)
    # A store that holds what it was given has no such count.
    return {**counts, "evicted": getattr(recorder.store, "num_dropped", 0)}


def _table(table: SlotTable) -> dict[str, int]:
    return {"slots": len(table.valid), "valid": int(table.valid.sum()), "bytes": table_bytes(table)}


def _release() -> str | None:
    try:
        return importlib.metadata.version(LEDGER.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
