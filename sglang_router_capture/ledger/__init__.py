"""The ledger: every SGLang name that we hook, call, override or read, why, and when the row can go."""

from __future__ import annotations

from router_replay.upstream import Ledger
from sglang_router_capture.ledger import capturer, plugin, requests, slots, start

LEDGER = Ledger(
    distribution="sglang",
    title="SGLang",
    prefix="sglang.srt.",
    subject="router capture",
    tested=("0.5.23",),
    checked=("0.5.20", "0.5.21", "0.5.22"),
    way_out="start the server without router capture",
    seams=start.SEAMS + plugin.SEAMS + capturer.SEAMS + slots.SEAMS + requests.SEAMS,
    attributes=start.ATTRIBUTES + capturer.ATTRIBUTES + requests.ATTRIBUTES,
)
