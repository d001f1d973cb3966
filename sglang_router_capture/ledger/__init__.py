"""The ledger: every SGLang name that we hook, call, override or read, why, and when the row can go."""

from __future__ import annotations

from router_replay.upstream import Ledger
from sglang_router_capture.ledger import (
    capturer,
    endpoints,
    hicache,
    parallel,
    plugin,
    requests,
    slots,
    start,
    status,
    weights,
)

_PARTS = (start, plugin, capturer, slots, requests, endpoints, weights, hicache, parallel, status)

LEDGER = Ledger(
    distribution="sglang",
    title="SGLang",
    prefix="sglang.srt.",
    subject="router capture",
    tested=("0.5.20", "0.5.23"),
    checked=("0.5.21", "0.5.22"),
    way_out="start the server without router capture",
    seams=tuple(seam for part in _PARTS for seam in part.SEAMS),
    attributes=tuple(attribute for part in _PARTS for attribute in part.ATTRIBUTES),
)
