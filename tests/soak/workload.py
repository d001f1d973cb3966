"""What clients and operators of a server do, at random and repeatably."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cpu_engines.sglang.server import Server
from router_replay.masks import RoutingGeometry
from tests.soak.answers import Answer, read_answer
from tests.soak.checkpoints import Checkpoints
from tests.soak.tally import Tally
from tests.soak.weights import WeightHistory

_VOCABULARY = 103
# The end of a turn, by which the model would stop early: a forbidden token and not `ignore_eos`, with which SGLang
# reserves the whole length and never retracts.
_END = 1


@dataclass
class Conversations:
    """Token ids of earlier answers, to be gone on with, cut and forked."""

    longest: int
    _known: list[list[int]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def prompt(self, rng: random.Random) -> list[int]:
        """Of a new turn: a new conversation under one of a few long system prompts, the next turn of one, or a fork."""
        with self._lock:
            old = rng.choice(self._known) if self._known else []
        kind = rng.random()
        if not old or kind < 0.3 or len(old) > self.longest:
            system = random.Random(rng.randrange(4))
            ids = [system.randrange(_VOCABULARY) for _ in range(system.randrange(40, 90))]
        elif kind < 0.8:
            ids = list(old)
        else:
            ids = old[: rng.randrange(len(old) // 2, len(old))]
        return ids + [rng.randrange(_VOCABULARY) for _ in range(rng.randrange(1, 40))]

    def add(self, token_ids: list[int]) -> None:
        """Remember an answer, in the place of the oldest once there are many."""
        with self._lock:
            self._known.append(token_ids)
            if len(self._known) > 80:
                self._known.pop(0)


class Client:
    """Sends requests one after another, of every kind, until it is told to stop."""

    def __init__(
        self,
        server: Server,
        conversations: Conversations,
        geometry: RoutingGeometry,
        tally: Tally,
        give: Callable[[Answer], None],
        seed: str,
    ) -> None:
        self._server = server
        self._conversations = conversations
        self._geometry = geometry
        self._tally = tally
        self._give = give
        self._rng = random.Random(seed)
        self._seed = seed
        self._sent = 0

    def run(self, stop: threading.Event) -> None:
        """Send until `stop` is set; what goes wrong is a fault of the tally."""
        while not stop.is_set():
            try:
                self._request()
            except (OSError, http.client.HTTPException) as error:
                if not stop.is_set():
                    self._tally.fault(f"a request failed: {error!r}")
                    time.sleep(1)
            except Exception as error:
                self._tally.fault(f"{type(error).__name__}: {error}")

    def _request(self) -> None:
        rng = self._rng
        self._sent += 1
        rid = f"{self._seed}-{self._sent}"
        prompt = self._conversations.prompt(rng)
        sampling: dict[str, Any] = {
            "max_new_tokens": rng.randrange(1, 90),
            "temperature": rng.choice([0.0, 1.0]),
            "logit_bias": {str(_END): -1e4},
        }
        body: dict[str, Any] = {"rid": rid, "input_ids": prompt, "return_routed_experts": True}
        kind = rng.random()
        if kind < 0.05:
            sampling["n"], sampling["temperature"] = 2, 1.0
        elif kind < 0.10:
            body["routed_experts_start_len"] = rng.randrange(len(prompt))
        elif kind < 0.15:
            body["return_routed_experts"] = False
        body["sampling_params"] = sampling
        if kind > 0.95:
            self._disconnect(body)
            return
        if kind > 0.85:
            timer = threading.Timer(rng.random() * 1.5, self._abort, [rid])
            timer.daemon = True
            timer.start()
        body["stream"] = 0.7 < kind < 0.85
        sent = time.monotonic()
        answers = _stream(self._server, body) if body["stream"] else self._server.post("/generate", body, 600)
        received = time.monotonic()
        for answer in answers if isinstance(answers, list) else [answers]:
            self._take(answer, body, sent, received)

    def _take(self, answer: dict[str, Any], body: dict[str, Any], sent: float, received: float) -> None:
        meta = answer["meta_info"]
        self._tally.happened("answers")
        # Those that were aborted in the queue are answered with less.
        meta.setdefault("num_retractions", 0)
        meta.setdefault("cached_tokens", 0)
        self._tally.happened("retractions", meta["num_retractions"])
        if meta["finish_reason"] and meta["finish_reason"]["type"] == "abort":
            self._tally.happened("answers of aborted requests")
        self._conversations.add(body["input_ids"] + answer["output_ids"])
        if not body["return_routed_experts"]:
            return
        start = body.get("routed_experts_start_len", 0)
        read = read_answer(answer, body["input_ids"], start, self._geometry, sent, received)
        if read is None:
            self._tally.happened("answers without a token")
        else:
            self._give(read)

    def _abort(self, rid: str) -> None:
        self._tally.happened("aborts sent")
        _post(self._server, "/abort_request", {"rid": rid})

    def _disconnect(self, body: dict[str, Any]) -> None:
        """Read some of a stream and go."""
        self._tally.happened("clients that went away")
        connection = _connected(self._server)
        try:
            connection.request("POST", "/generate", json.dumps({**body, "stream": True}), _JSON)
            response = connection.getresponse()
            for _ in range(self._rng.randrange(6)):
                response.readline()
        finally:
            connection.close()


class Operator:
    """Updates weights, with names and without, pauses, retracts and flushes, at random times."""

    def __init__(
        self,
        server: Server,
        checkpoints: Checkpoints,
        history: WeightHistory,
        tally: Tally,
        seed: str,
        pause_s: float,
        unnamed: bool,
    ) -> None:
        self._server = server
        self._checkpoints = checkpoints
        self._history = history
        self._tally = tally
        self._rng = random.Random(seed)
        self._pause_s = pause_s
        self._unnamed = unnamed
        self._names = 0

    def run(self, stop: threading.Event) -> None:
        """Act until `stop` is set."""
        while not stop.wait(self._rng.random() * 2 * self._pause_s):
            try:
                self._act()
            except (OSError, http.client.HTTPException) as error:
                if not stop.is_set():
                    self._tally.fault(f"an operator's request failed: {error!r}")

    def _act(self) -> None:
        rng = self._rng
        kind = rng.random()
        if kind < 0.15:
            self._flush()
        elif kind < 0.25:
            self._rename()
        elif kind < 0.45:
            # Nothing runs then, so that a flush is not refused.
            self._paused("retract", self._flush if rng.random() < 0.7 else lambda: None)
        elif kind < 0.6:
            self._update(flush=rng.random() < 0.5)
        elif kind < 0.75:
            self._paused("in_place", lambda: self._update(flush=False))
        else:
            self._paused("retract", lambda: self._update(flush=rng.random() < 0.5))

    def _flush(self) -> None:
        done = _post(self._server, "/flush_cache", {})
        self._tally.happened("flushes" if done else "flushes that were refused")

    def _paused(self, mode: str, act: Callable[[], None]) -> None:
        _post(self._server, "/pause_generation", {"mode": mode})
        self._tally.happened(f"pauses ({mode})")
        try:
            act()
        finally:
            _post(self._server, "/continue_generation", {})

    def _rename(self) -> None:
        name = self._name()
        self._history.begin(name, self._history.current)
        _post(self._server, "/update_weight_version", {"new_version": name, "abort_all_requests": False})
        self._history.done()
        self._tally.happened("new names for the same weights")

    def _update(self, flush: bool) -> None:
        others = [c for c in range(len(self._checkpoints.folders)) if c != self._history.current]
        checkpoint = self._rng.choice(others)
        name = None if self._unnamed and self._rng.random() < 0.5 else self._name()
        self._history.begin(name, checkpoint)
        body = {"model_path": str(self._checkpoints.folders[checkpoint]), "flush_cache": flush}
        done = _post(
            self._server, "/update_weights_from_disk", body | ({} if name is None else {"weight_version": name})
        )
        self._history.done()
        kind = ("without a name" if name is None else "with a name") + (", flushed" if flush else "")
        # Refused flushes leave the new weights in.
        self._tally.happened(f"weight updates {kind}" if done else "weight updates whose flush was refused")

    def _name(self) -> str:
        self._names += 1
        return f"step-{self._names}"


_JSON = {"Content-Type": "application/json"}


def _connected(server: Server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=600)


def _post(server: Server, path: str, body: dict[str, Any]) -> bool:
    """POST; whether the server agreed."""
    connection = _connected(server)
    try:
        connection.request("POST", path, json.dumps(body), _JSON)
        response = connection.getresponse()
        response.read()
        return response.status == 200
    finally:
        connection.close()


def _stream(server: Server, body: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
    """The last chunk of a stream; of several choices the last chunk of each."""
    connection = _connected(server)
    try:
        connection.request("POST", "/generate", json.dumps(body), _JSON)
        response = connection.getresponse()
        if response.status != 200:
            raise urllib.error.HTTPError(server.url, response.status, response.read().decode(), response.headers, None)
        last: dict[int, dict[str, Any]] = {}
        for line in response:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise http.client.HTTPException(str(chunk))
                last[chunk.get("index", 0)] = chunk
        return list(last.values())
    finally:
        connection.close()
