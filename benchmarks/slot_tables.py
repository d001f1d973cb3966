"""Slot tables full of routes, at a released model's shape: SGLang's own and this package's, of the same tokens."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.managers.io_struct import BatchTokenIDOutput
from sglang.srt.state_capturer.base import BaseTopkCapturer
from torch import Tensor

from benchmarks.mask_codec.models import DENSE_LAYERS, geometry_of
from router_replay.masks import Codec, choose_codec, open_store
from sglang_router_capture.options import CaptureOptions
from sglang_router_capture.recorder import Recorder

# So many rows are drawn, and repeated: what they are changes nothing, and drawing them takes its time.
_DRAWN = 1024


@dataclass(frozen=True)
class Tables:
    """What a scheduler has of one request whose tokens lie in slots without any order.

    Attributes:
        pool: as SGLang's `ReqToTokenPool`; the request is its row 0.
        routes: `int32 [tokens, layers, K]` by slot, as SGLang's own capture keeps them: of dense layers, too.
        recorders: this package's, by format.
    """

    pool: Any
    routes: Tensor
    recorders: dict[str, Recorder]

    def stock(self, tokens: int, start: int = 0) -> Tensor:
        """Routes of the request's tokens [start, tokens - 1), by SGLang's own gathering."""
        # SGLang's own capturer pins its table, which a machine without a GPU cannot; reading it is the same.
        capturer: Any = SimpleNamespace(host_cache=SimpleNamespace(buffer=self.routes))
        return BaseTopkCapturer.get_topk(capturer, 0, tokens, self.pool, start_len=start)


def filled(model: str, tokens: int, formats: Iterable[str]) -> Tables:
    """Tables of a request of `tokens` tokens, with a recorder for each format."""
    geometry = geometry_of(model)
    generator = torch.Generator().manual_seed(0)
    slots = torch.randperm(tokens, generator=generator)
    scores = torch.rand((_DRAWN, geometry.num_moe_layers, geometry.num_experts), generator=generator)
    drawn = scores.topk(geometry.top_k).indices.int()
    dense = DENSE_LAYERS.get(model, 0)
    routes = torch.zeros((tokens, dense + geometry.num_layers, geometry.top_k), dtype=torch.int32)
    recorders = {name: _recorder(geometry, name, tokens) for name in formats}
    for first in range(0, tokens, _DRAWN):
        here = slots[first : first + _DRAWN]
        routes[here, dense:] = drawn[: len(here)]
        for recorder in recorders.values():
            rows = recorder.codec.pack(drawn[: len(here)], geometry)
            version = recorder.weight_versions.number("default")
            recorder.table.write(here, rows, torch.ones(len(here), dtype=torch.bool), version)
    return Tables(SimpleNamespace(req_to_token=slots[None].int()), routes, recorders)


def finished(prompt: array[int], output: array[int], start: int = 0) -> Any:
    """A finished request whose KV is row 0 of the pool, with the attributes that its masks are made of."""
    return SimpleNamespace(
        origin_input_ids=prompt,
        output_ids=output,
        output_ids_through_stop=output,
        routed_experts_start_len=start,
        kv=SimpleNamespace(req_pool_idx=0),
    )


def batch_of_one(**fields: Any) -> BatchTokenIDOutput:
    """What a scheduler sends of one finished request, with `fields` in it."""
    return BatchTokenIDOutput(**{**_EMPTY, **fields})


def _recorder(geometry: Any, name: str, num_slots: int) -> Recorder:
    options = CaptureOptions(format=name)
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


_ONE_EACH: dict[str, Any] = {
    "finished_reasons": {"type": "length", "length": 1},
    "decoded_texts": "",
    "decode_ids": array("i", [0]),
    "read_offsets": 0,
    "output_ids": array("i", [0]),
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "no_stop_trim": False,
    "prompt_tokens": 0,
    "reasoning_tokens": 0,
    "completion_tokens": 1,
    "cached_tokens": 0,
}
_EMPTY: dict[str, Any] = {
    **dict.fromkeys(BatchTokenIDOutput.__struct_fields__),
    **{name: [value] for name, value in _ONE_EACH.items()},
}
