"""The same requests to servers with and without capture, in turns."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import statistics
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from cpu_engines.sglang.server import STAND_IN_PLUGIN, Server, serve

OFF, STOCK, MASKS, SGLANG, AGAIN = "off", "SGLang's own", "ours, masks", "ours, sglang", "off again"
_FLAGS = {
    OFF: (),
    STOCK: ("--enable-return-routed-experts",),
    MASKS: ("--enable-router-capture",),
    SGLANG: ("--enable-router-capture", "--router-capture-format=sglang"),
    AGAIN: (),
}
# Every model has these.
_VOCABULARY = 103
# What the project's small model needs; others are found without it.
_MODEL_PACKAGE = "examples.qwen3_moe.sglang_models"


@dataclass(frozen=True)
class Load:
    """What a round sends: `requests` at once, each of `prompt_tokens`, to be answered by `new_tokens`."""

    requests: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Round:
    """What one server did with one round.

    Attributes:
        wall: seconds until the last answer.
        cpu: seconds of the CPU in all of the server's processes.
        first_token: median seconds until a request's first token.
    """

    wall: float
    cpu: float
    first_token: float


@contextlib.contextmanager
def running(model: Path) -> Iterator[dict[str, Server]]:
    """A server of each kind, all at once; they sleep while nobody asks."""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(
                serve(
                    model,
                    "--skip-tokenizer-init",
                    "--max-total-tokens=8192",
                    "--random-seed=0",
                    *flags,
                    model_package=_MODEL_PACKAGE,
                    environment={"SGLANG_PLUGINS": STAND_IN_PLUGIN} if name in (OFF, STOCK, AGAIN) else None,
                    timeout_s=900,
                )
            )
            for name, flags in _FLAGS.items()
        }


def one_round(name: str, server: Server, load: Load, seed: int) -> Round:
    """Send a round's requests; no two rounds share a prefix."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(_VOCABULARY) for _ in range(load.prompt_tokens)] for _ in range(load.requests)]
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    cpu, wall = _cpu_seconds(processes), time.perf_counter()
    with ThreadPoolExecutor(load.requests) as pool:
        firsts = list(
            pool.map(lambda ids: _stream(server, ids, load.new_tokens, ask=name not in (OFF, AGAIN)), prompts)
        )
    return Round(time.perf_counter() - wall, _cpu_seconds(processes) - cpu, statistics.median(firsts))


def _stream(server: Server, ids: list[int], new_tokens: int, *, ask: bool) -> float:
    """Seconds until the first token; returns when the last is there, with its routes if it `ask`ed for them."""
    sampling = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": ids, "sampling_params": sampling, "stream": True, "return_routed_experts": ask}
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=600)
    began = time.perf_counter()
    first = None
    last = b""
    try:
        connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - began
                last = line
    finally:
        connection.close()
    meta = json.loads(last[6:])["meta_info"]
    if first is None or meta["completion_tokens"] != new_tokens:
        raise RuntimeError(f"the request was not answered whole: {meta}")
    if ask and not (meta.get("routed_experts") or meta.get("routing_masks")):
        raise RuntimeError(f"the answer has no routes: {meta}")
    return first


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))
