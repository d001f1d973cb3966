"""The scheduler's pause when a long request ends: what its thread does, until the answer is made ready to be sent.

SGLang's own capture gathers the routes and encodes them. This package in masks gathers the packed rows and encodes a
ticket; other threads make the masks and store them, and what they take is in the servers' CPU time, not in the pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import torch
from sglang.srt.managers.io_struct import enc_hook
from sglang.srt.state_capturer.base import BaseTopkCapturer

from benchmarks.capture.serving import MASKS, SGLANG, STOCK
from benchmarks.mask_codec.models import geometry_of
from router_replay.masks import Codec, choose_codec, open_store
from sglang_router_capture import answer, sglang_format
from sglang_router_capture.mailbox import Mailbox
from sglang_router_capture.options import CaptureOptions
from sglang_router_capture.recorder import Recorder
from sglang_router_capture.writer import Writer

_AT_ONCE = 1024


@contextlib.contextmanager
def pauses(model: str, tokens: int) -> Iterator[tuple[dict[str, Callable[[], Any]], Callable[[], None]]]:
    """By variant, what a scheduler does when a request of `tokens` tokens ends; and what waits for other threads.

    Slots lie in no order.
    """
    geometry = geometry_of(model)
    generator = torch.Generator().manual_seed(0)
    slots = torch.randperm(tokens, generator=generator)
    pool: Any = SimpleNamespace(req_to_token=slots[None].int())
    recorders = {name: _recorder(model, name, tokens) for name in (MASKS, SGLANG)}
    routes = torch.empty((tokens, geometry.num_layers, geometry.top_k), dtype=torch.int32)
    for first in range(0, tokens, _AT_ONCE):
        here = slots[first : first + _AT_ONCE]
        scores = torch.rand((len(here), geometry.num_moe_layers, geometry.num_experts), generator=generator)
        indices = scores.topk(geometry.top_k).indices.int()
        routes[here] = indices
        for recorder in recorders.values():
            rows = recorder.codec.pack(indices, geometry)
            version = recorder.weight_versions.number("default")
            recorder.table.write(here, rows, torch.ones(len(here), dtype=torch.bool), version)
    # SGLang's own capturer pins its table, which a machine without a GPU cannot; reading it is the same.
    stock: Any = SimpleNamespace(host_cache=SimpleNamespace(buffer=routes))
    encode = msgspec.msgpack.Encoder(enc_hook=enc_hook).encode

    # What they are does not matter; a scheduler has them as lists.
    ids = list(range(tokens - tokens // 32)), list(range(tokens // 32))

    submitted: list[dict[str, Any]] = []

    def ends_with_stock() -> bytes:
        return encode([BaseTopkCapturer.get_topk(stock, 0, tokens, pool)])

    def ends_with_sglang() -> bytes:
        return encode([recorders[SGLANG].get_topk(0, tokens, pool)])

    def ends_with_masks() -> bytes:
        request = _finished(ids)
        answer.collect(recorders[MASKS], request, pool)
        tickets = answer.handles(request)
        submitted.extend(tickets)
        return encode([tickets])

    if not torch.equal(sglang_format.unpacked(recorders[SGLANG].get_topk(0, tokens, pool)), routes[slots[:-1]]):
        raise RuntimeError("the two capturers do not return the same routes")
    with tempfile.TemporaryDirectory() as folder:
        mailbox = Mailbox(Path(folder))
        writer = Writer(recorders[MASKS].store, "inline:", mailbox)
        recorders[MASKS].writer = writer

        def settled() -> None:
            while submitted:
                asyncio.run(mailbox.redeemed(submitted.pop()))

        yield {STOCK: ends_with_stock, MASKS: ends_with_masks, SGLANG: ends_with_sglang}, settled
        writer.close()


def _recorder(model: str, variant: str, num_slots: int) -> Recorder:
    geometry = geometry_of(model)
    options = CaptureOptions(format="sglang" if variant == SGLANG else "masks")
    codec: Codec = choose_codec("auto", geometry, order=options.needs_order)
    return Recorder(
        geometry,
        codec,
        options=options,
        store=open_store("inline:"),
        num_slots=num_slots,
        max_tokens_per_pass=1,
        num_fused_shared_experts=0,
        device="cpu",
    )


def _finished(ids: tuple[list[int], list[int]]) -> Any:
    prompt, output = ids
    return SimpleNamespace(
        origin_input_ids=prompt,
        output_ids=output,
        output_ids_through_stop=output,
        routed_experts_start_len=0,
        kv=SimpleNamespace(req_pool_idx=0),
    )
