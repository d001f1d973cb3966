"""The server's process: asks the scheduler, and writes the answer, as SGLang's HTTP server and tokenizer manager do."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import uvicorn
import zmq
import zmq.asyncio
from fastapi import FastAPI, Request, Response
from sglang.srt.managers.io_struct import BatchStrOutput, async_sock_recv, unwrap_from_pickle
from sglang.srt.utils.json_response import orjson_response
from sglang.srt.utils.network import get_zmq_socket

from benchmarks.transport.scheduler import trim
from benchmarks.transport.ways import HANDED, HOPS, TRIM, Places
from router_replay.masks.stores.directory import DirectoryStore
from router_replay.masks.stores.served import ServedDirectory
from sglang_router_capture.answer import META_INFO_KEY
from sglang_router_capture.hooks.endpoints import with_handles
from sglang_router_capture.http import add_masks_route
from sglang_router_capture.mailbox import Mailbox


def run(places: Places, hops: Any, ready: Any) -> None:
    """Serve one request after the other, until the process ends."""
    context = zmq.asyncio.Context(2)
    asked = get_zmq_socket(context, zmq.PUSH, places.socket("asked"), False)
    written = get_zmq_socket(context, zmq.PULL, places.socket("written"), True)
    mailbox = Mailbox(places.handles)
    app = FastAPI()
    add_masks_route(app, ServedDirectory(places.server, DirectoryStore(f"file://{places.served}")))

    async def generate(request: Request) -> Response:
        body = await request.body()
        await asked.send(body)
        if json.loads(body)["way"] == TRIM:
            trim()
        batch: BatchStrOutput = await async_sock_recv(written)
        handed = [answer async for answer in with_handles(_answers(batch), mailbox)]
        if json.loads(body)["look"]:
            # As the mailbox writes them.
            given = [msgspec.msgpack.encode(handle) for handle in handed[0]["meta_info"].get(META_INFO_KEY, [])]
            hops[HOPS.index(HANDED)] += sum(map(len, given))
        return orjson_response(handed[0])

    app.add_api_route("/generate", generate, methods=["POST"], response_model=None)

    @app.get("/health")
    def health() -> str:
        return "ok"

    ready.send("ready")
    uvicorn.run(app, host="127.0.0.1", port=places.port, log_level="warning")


async def _answers(batch: BatchStrOutput) -> AsyncGenerator[dict[str, Any], None]:
    """What SGLang's tokenizer manager makes of a batch of one, as far as routes are concerned."""
    meta_info: dict[str, Any] = {"id": batch.rids[0], "finish_reason": batch.finished_reasons[0]}
    if batch.routed_experts:
        meta_info["routed_experts"] = batch.routed_experts[0]
    if batch.customized_info is not None:
        meta_info[META_INFO_KEY] = unwrap_from_pickle(batch.customized_info)[META_INFO_KEY][0]
    yield {"text": batch.output_strs[0], "meta_info": meta_info}
