"""The scheduler's process: gathers the routes of a finished request and sends them on, as SGLang's does."""

from __future__ import annotations

import ctypes
from array import array
from typing import Any

import torch
import zmq
from sglang.srt.managers.io_struct import BatchTokenIDOutput, sock_send, wrap_as_pickle
from sglang.srt.utils.network import get_zmq_socket

from benchmarks.slot_tables import Tables, batch_of_one, filled, finished
from benchmarks.transport.ways import HTTP, STOCK, STORED, TRIM, Places
from router_replay.masks import Store, open_store
from router_replay.masks.stores.directory import DirectoryStore
from router_replay.masks.stores.served import ServedDirectory
from sglang_router_capture import answer
from sglang_router_capture.mailbox import Mailbox
from sglang_router_capture.writer import Writer

SAMPLED = 32
"""Tokens of each request that it sampled; the others are its prompt."""


def run(places: Places, models: dict[str, int], ready: Any) -> None:
    """Answer what the server asks for, until the process ends.

    Args:
        models: most tokens of a request, by model.
    """
    torch.set_num_threads(1)
    tables = {model: filled(model, tokens, ("masks",)) for model, tokens in models.items()}
    mailbox = Mailbox(places.handles)
    writers = {way: Writer(_store(places, way), places.url(way), mailbox) for way in STORED}
    context = zmq.Context(2)
    asked = get_zmq_socket(context, zmq.PULL, places.socket("asked"), True)
    answers = get_zmq_socket(context, zmq.PUSH, places.socket("scheduled"), False)
    ready.send("ready")
    while True:
        request = asked.recv_json()
        if request["way"] == TRIM:
            trim()
        sock_send(answers, _output(request, tables.get(request["model"]), writers))


def trim() -> None:
    """Give back the memory that this process does not use, so that what a request needs can be seen."""
    ctypes.CDLL(None).malloc_trim(0)


def _store(places: Places, way: str) -> Store:
    if way == HTTP:
        store: Store = ServedDirectory(places.server, DirectoryStore(f"file://{places.served}"))
    else:
        store = open_store(places.url(way))
    store.prepare()
    return store


def _output(request: dict[str, Any], tables: Tables | None, writers: dict[str, Writer]) -> BatchTokenIDOutput:
    way, tokens, start = request["way"], request["tokens"], request["start"]
    others: dict[str, Any] = {}
    if tables is not None and way == STOCK:
        others["routed_experts"] = [tables.stock(tokens, start)]
    elif tables is not None and way in writers:
        # The tokens are their own numbers, for the reader to know them; a scheduler has them as arrays.
        prompt, output = array("q", range(tokens - SAMPLED)), array("q", range(tokens - SAMPLED, tokens))
        done = finished(prompt, output, start)
        recorder = tables.recorders["masks"]
        recorder.writer = writers[way]
        answer.collect(recorder, done, tables.pool)
        others["customized_info"] = wrap_as_pickle({answer.META_INFO_KEY: [answer.handles(done)]})
    return batch_of_one(rids=[way], **others)
