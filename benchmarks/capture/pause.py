"""The scheduler's pause when a long request ends: what its thread does, until the answer is made ready to be sent.

SGLang's own capture gathers the routes and encodes them. This package in masks notes the slots and encodes a ticket;
other threads copy the rows, make the masks and store them, and what they take is in the servers' CPU time, not in the
pause. In a running server it is measured by `python -m benchmarks.pause`.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sglang.srt.managers.io_struct import sock_send, wrap_as_pickle

from benchmarks.capture.serving import MASKS, SGLANG, STOCK
from benchmarks.counted_socket import CountedSocket
from benchmarks.slot_tables import batch_of_one, filled, finished
from sglang_router_capture import answer, sglang_format
from sglang_router_capture.mailbox import Mailbox
from sglang_router_capture.writer import Writer


@contextlib.contextmanager
def pauses(model: str, tokens: int) -> Iterator[tuple[dict[str, Callable[[], Any]], Callable[[], None]]]:
    """By variant, what a scheduler does when a request of `tokens` tokens ends; and what waits for other threads."""
    tables = filled(model, tokens, ("masks", "sglang"))
    masks, sglang = tables.recorders["masks"], tables.recorders["sglang"]
    nowhere: Any = CountedSocket()
    # What they are does not matter; a scheduler has them as arrays.
    ids = array("q", range(tokens - tokens // 32)), array("q", range(tokens // 32))
    submitted: list[dict[str, Any]] = []

    def send(**fields: Any) -> None:
        sock_send(nowhere, batch_of_one(**fields))

    def ends_with_stock() -> None:
        send(routed_experts=[tables.stock(tokens)])

    def ends_with_sglang() -> None:
        send(routed_experts=[sglang.get_topk(0, tokens, tables.pool)])

    def ends_with_masks() -> None:
        request = finished(*ids)
        answer.collect(masks, request, tables.pool)
        tickets = answer.handles(request)
        submitted.extend(tickets)
        send(customized_info=wrap_as_pickle({answer.META_INFO_KEY: [tickets]}))

    if not torch.equal(sglang_format.unpacked(sglang.get_topk(0, tokens, tables.pool)), tables.stock(tokens)):
        raise RuntimeError("the two capturers do not return the same routes")
    with tempfile.TemporaryDirectory() as folder:
        mailbox = Mailbox(Path(folder))
        writer = Writer(masks.store, "inline:", mailbox)
        masks.writer = writer

        def settled() -> None:
            while submitted:
                asyncio.run(mailbox.redeemed(submitted.pop()))

        yield {STOCK: ends_with_stock, MASKS: ends_with_masks, SGLANG: ends_with_sglang}, settled
        writer.close()
