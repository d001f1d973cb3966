"""Long requests that end, and short ones that arrive meanwhile and want their first token."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmarks.mask_codec.models import geometry_of
from benchmarks.pause.servers import STOCK, VOCABULARY, Measured, Sizes
from router_replay.masks import load, open_store

_SHORT_TOKENS = 16
_SHORT_NEW_TOKENS = 2
_TIMEOUT_S = 900.0
_CHUNK = 1 << 20


class ShortRequests:
    """Short requests without routes, one after each `interval` seconds, whether those before were answered or not."""

    def __init__(self, measured: Measured, interval: float) -> None:
        self._measured, self._interval = measured, interval
        self._first_tokens: dict[float, float] = {}
        self._rng = random.Random(1)

    @contextlib.contextmanager
    def arriving(self) -> Iterator[None]:
        """They arrive for the length of the block, and are answered at its end."""
        stop, asked = threading.Event(), []
        with ThreadPoolExecutor(64) as pool:

            def arrive() -> None:
                due = time.monotonic()
                while not stop.wait(max(0.0, due - time.monotonic())):
                    asked.append(pool.submit(self._ask, _ids(self._rng, _SHORT_TOKENS)))
                    due += self._interval

            thread = threading.Thread(target=arrive)
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()
        for each in asked:
            each.result()

    def first_tokens(self, since: float, until: float) -> list[float]:
        """Seconds until the first token, of those that were asked in [since, until), by `time.monotonic`."""
        return [taken for asked, taken in sorted(self._first_tokens.items()) if since <= asked < until]

    def _ask(self, ids: list[int]) -> None:
        sampling = {"max_new_tokens": _SHORT_NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        asked = time.monotonic()
        with _answer(self._measured, {"input_ids": ids, "sampling_params": sampling, "stream": True}) as lines:
            for line in lines:
                if line.startswith(b"data: {"):
                    self._first_tokens.setdefault(asked, time.monotonic() - asked)


@dataclass(frozen=True)
class Answered:
    """Long requests that were answered: their prompts, and the answer's body, or its size alone."""

    prompts: list[list[int]]
    body: bytes
    size: int


class LongRequests:
    """Long requests that have all but their last tokens in common, so that a server computes them once."""

    def __init__(self, measured: Measured, sizes: Sizes, variant: str, model: str) -> None:
        self._measured, self._sizes, self._stock = measured, sizes, variant == STOCK
        self._geometry = geometry_of(model)
        self._rng = random.Random(0)
        self._prefix = _ids(self._rng, sizes.tokens - sizes.own_tokens - sizes.new_tokens)

    def end(self, number: int, *, with_routes: bool) -> Answered:
        """Let so many requests run and end together; return when they are answered."""
        prompts = [self._prefix + _ids(self._rng, self._sizes.own_tokens) for _ in range(number)]
        sampling = {"max_new_tokens": self._sizes.new_tokens, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": prompts, "sampling_params": sampling, "return_routed_experts": with_routes}
        kept, size = [], 0
        with _answer(self._measured, body) as answer:
            while chunk := answer.read(_CHUNK):
                size += len(chunk)
                # SGLang's own routes are gigabytes of text, which nobody here unpacks.
                if not (self._stock and with_routes):
                    kept.append(chunk)
        return Answered(prompts, b"".join(kept), size)

    def check(self, answered: Answered, *, with_routes: bool) -> None:
        """See that they were answered whole, with the routes of their tokens, and let these go.

        Raises:
            RuntimeError: they were not.
        """
        if self._stock and with_routes:
            routes = (self._sizes.tokens - 1) * self._geometry.num_layers * self._geometry.top_k * 4
            if answered.size < len(answered.prompts) * routes * 4 // 3:
                raise RuntimeError(
                    f"{answered.size:,} bytes are too few for routes of {len(answered.prompts)} requests"
                )
            return
        for prompt, answer in zip(answered.prompts, json.loads(answered.body), strict=True):
            if len(answer["output_ids"]) != self._sizes.new_tokens:
                raise RuntimeError(f"a request was answered with {len(answer['output_ids'])} tokens")
            if with_routes:
                self._check_masks(answer["meta_info"]["routing_masks"], prompt + answer["output_ids"])

    def _check_masks(self, handles: list[dict[str, Any]], token_ids: list[int]) -> None:
        (handle,) = handles
        masks = load(handle)
        masks.check_tokens(token_ids)
        if masks.geometry != self._geometry or len(masks) != len(token_ids) - 1 or not bool(masks.valid.all()):
            raise RuntimeError(f"an answer's masks lack rows: {int(masks.valid.sum())} of {len(token_ids) - 1}")
        with open_store(handle["store"]) as store:
            store.delete(handle)


def _ids(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(length)]


@contextlib.contextmanager
def _answer(measured: Measured, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(measured.server.url).netloc, timeout=_TIMEOUT_S)
    try:
        connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"the server refused a request ({answer.status}): {answer.read(500)!r}")
        yield answer
    finally:
        connection.close()
