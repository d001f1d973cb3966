"""Requests that are under way on a server under test, while something else happens to it."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from cpu_engines.sglang.server import Server
from tests.sglang_router_capture.requests import END


def control(server: Server, path: str, **body: Any) -> None:
    """POST to an endpoint whose answer nobody needs.

    Raises:
        urllib.error.HTTPError: the server refused the request.
    """
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(server.url + path, data, headers), timeout=120):
        return


@contextmanager
def underway(
    server: Server, prompts: list[list[int]], max_new_tokens: int, *, tokens: int = 1, **fields: Any
) -> Iterator[list[Future[dict[str, Any]]]]:
    """Greedy requests, `rid-<number>` each, that ask for routes and never stop early.

    The block begins when each of them has sampled `tokens` tokens. A future gives the last part of its stream.
    """
    started = [threading.Event() for _ in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        futures = [
            pool.submit(_stream, server, ids, max_new_tokens, f"rid-{number}", tokens, started[number], fields)
            for number, ids in enumerate(prompts)
        ]
        for event in started:
            assert event.wait(120), "a request sampled nothing"
        yield futures


def _stream(
    server: Server, ids: list[int], max_new_tokens: int, rid: str, tokens: int, started: threading.Event, fields: Any
) -> dict[str, Any]:
    # With `ignore_eos` the scheduler reserves the whole length; forbidding the token hides it.
    sampling = {"max_new_tokens": max_new_tokens, "temperature": 0, "logit_bias": {str(END): -1e4}}
    body = {"input_ids": ids, "rid": rid, "stream": True, "return_routed_experts": True, "sampling_params": sampling}
    request = urllib.request.Request(
        server.url + "/generate", json.dumps({**body, **fields}).encode(), {"Content-Type": "application/json"}
    )
    last: dict[str, Any] = {}
    with urllib.request.urlopen(request, timeout=300) as stream:
        for line in stream:
            if line.startswith(b"data: {"):
                last = json.loads(line[6:])
                if len(last["output_ids"]) >= tokens:
                    started.set()
    return last
