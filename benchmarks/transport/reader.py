"""The trainer's process: asks the server, and has what a router takes, packed rows or SGLang's expert ids."""

from __future__ import annotations

import hashlib
import http.client
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pybase64
import torch
from torch import Tensor

from benchmarks.mask_codec.models import DENSE_LAYERS, geometry_of
from benchmarks.transport.scheduler import SAMPLED, trim
from benchmarks.transport.ways import ANSWERED, HOPS, KEPT, NOTHING, STOCK, TRIM, Places
from router_replay.masks import Rollout, RoutingMasks, masks_from_meta_info, open_store
from router_replay.masks.codecs.row_codec import get_codec

WHOLE, FROM, ROLLOUT = "whole prefixes", "routed_experts_start_len", "Rollout"
"""How the turns of a conversation are asked for: all rows each time, new ones only, or by `Rollout`."""

_AT_ONCE = 4096

_Taken = RoutingMasks | Tensor | None


@dataclass(frozen=True)
class Ask:
    """One request, or the conversation that ends with it.

    Attributes:
        way: that its routes take.
        model: whose shape they have.
        tokens: prompt and output, `SAMPLED` of them sampled.
        turns: of the conversation, equally long; 1 for a request alone.
        asked: how its turns are asked for.
        look: count bytes.
    """

    way: str
    model: str
    tokens: int
    turns: int = 1
    asked: str = WHOLE
    look: bool = False


def run(places: Places, hops: Any, jobs: Any) -> None:
    """Do what is asked for, one after the other, until None comes; answer with a digest of the routes that came."""
    torch.set_num_threads(1)
    if places.ray:
        import ray

        ray.init(places.ray, log_to_driver=False, configure_logging=False)
    reader = _Reader(places, hops)
    jobs.send("ready")
    while (ask := jobs.recv()) is not None:
        if ask.way == TRIM:
            reader.answer(ask, 1, 0)
            trim()
            jobs.send("")
            continue
        taken = reader.alone(ask) if ask.turns == 1 else reader.conversation(ask)
        jobs.send("done")
        # The driver has read clocks and memory by then.
        jobs.send(_digest(taken) if jobs.recv() == "digest" else "")
        del taken


class _Reader:
    def __init__(self, places: Places, hops: Any) -> None:
        self._places = places
        self._hops = hops

    def alone(self, ask: Ask) -> _Taken:
        return self._taken(ask, self.answer(ask, ask.tokens, 0), ask.tokens, 0)

    def conversation(self, ask: Ask) -> _Taken:
        lengths = [ask.tokens * turn // ask.turns for turn in range(1, ask.turns + 1)]
        ids = np.arange(ask.tokens)
        rollout, parts = Rollout(), []
        for length in lengths:
            prompt, output = ids[: length - SAMPLED], ids[length - SAMPLED : length]
            start = 0
            if ask.asked == ROLLOUT:
                start = rollout.request_fields(prompt)["routed_experts_start_len"]
            elif ask.asked == FROM:
                start = sum(map(len, parts))
            meta_info = self.answer(ask, length, start)
            if ask.asked == ROLLOUT:
                rollout.add(meta_info, output)
                self._let_go(ask, meta_info)
            elif ask.asked == FROM:
                parts.append(self._taken(ask, meta_info, length, start))
        if ask.asked == ROLLOUT:
            return rollout.join()
        if ask.asked == WHOLE:
            return self._taken(ask, meta_info, ask.tokens, 0)
        return torch.cat(parts) if ask.way == STOCK else RoutingMasks.join(parts, ids)

    def answer(self, ask: Ask, tokens: int, start: int) -> dict[str, Any]:
        """The `meta_info` of one request."""
        body = {"way": ask.way, "model": ask.model, "tokens": tokens, "start": start, "look": ask.look}
        connection = http.client.HTTPConnection("127.0.0.1", self._places.port, timeout=600)
        try:
            connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"the server answered {response.status}: {text[:500]!r}")
        self._hops[HOPS.index(ANSWERED)] += len(text)
        return json.loads(text)["meta_info"]

    def _taken(self, ask: Ask, meta_info: dict[str, Any], tokens: int, start: int) -> _Taken:
        if ask.way == NOTHING:
            return None
        if ask.way == STOCK:
            geometry = geometry_of(ask.model)
            # As trainers do; a copy, since a tensor of what cannot be written to is refused.
            data = bytearray(pybase64.b64decode(meta_info["routed_experts"]))
            routes = torch.frombuffer(data, dtype=torch.int32)
            return routes.reshape(tokens - 1 - start, -1, geometry.top_k)[:, DENSE_LAYERS.get(ask.model, 0) :]
        masks = masks_from_meta_info(meta_info)
        self._let_go(ask, meta_info)
        return masks

    def _let_go(self, ask: Ask, meta_info: dict[str, Any]) -> None:
        (handle,) = meta_info["routing_masks"]
        with open_store(handle["store"]) as store:
            if ask.look and "data" not in handle:
                self._hops[HOPS.index(KEPT)] += store.stat(handle).num_bytes
            store.delete(handle)


def _digest(taken: _Taken) -> str:
    """Of the sets of experts, which both ends must agree on; their order travels in SGLang's way alone."""
    if taken is None:
        return ""
    if isinstance(taken, RoutingMasks) and not taken.valid.all():
        raise RuntimeError(f"{int((~taken.valid).sum())} rows are not valid")
    digest = hashlib.sha256()
    for first in range(0, len(taken), _AT_ONCE):
        rows = slice(first, first + _AT_ONCE)
        if isinstance(taken, RoutingMasks):
            experts = get_codec(taken.codec).unpack_indices(taken.rows[rows], taken.geometry)
        else:
            experts = taken[rows]
        digest.update(experts.int().sort(-1).values.numpy().tobytes())
    return digest.hexdigest()
