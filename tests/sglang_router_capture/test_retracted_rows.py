"""Rows of a request that loses its KV on the way: those of the passes whose log-probabilities it returns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from router_replay.masks import RoutingGeometry, RoutingMasks, get_codec, load, open_store
from sglang_router_capture import answer
from sglang_router_capture import recorder as recorder_module
from sglang_router_capture.options import CaptureOptions

GEOMETRY = RoutingGeometry(num_layers=3, moe_layers=(1, 2), num_experts=8, top_k=2)
PROMPT = [5, 6, 7]


class Request:
    """A request with its slots, and a table that a prefill or a decode step writes with one expert for all."""

    def __init__(self, recorder: recorder_module.Recorder, start_len: int = 0) -> None:
        self.recorder = recorder
        self.pool = SimpleNamespace(req_to_token=torch.zeros((1, 32), dtype=torch.int64))
        self.req: Any = SimpleNamespace(
            origin_input_ids=PROMPT,
            output_ids=[],
            routed_experts_start_len=start_len,
            kv=SimpleNamespace(req_pool_idx=0),
        )

    def compute(
        self, first: int, last: int, expert: int, first_slot: int, version: int = 0, valid: bool = True
    ) -> None:
        slots = torch.arange(first_slot, first_slot + last - first)
        self.pool.req_to_token[0, first:last] = slots
        indices = torch.tensor([expert, expert + 1]).expand(last - first, 2, 2)
        rows = self.recorder.codec.pack(indices, GEOMETRY)
        self.recorder.table.write(slots, rows, torch.full((last - first,), valid), version)

    def retract(self) -> None:
        answer.keep(self.recorder, self.req, self.pool)
        self.pool.req_to_token[0] = 31

    def finish(self) -> RoutingMasks:
        self.req.output_ids_through_stop = self.req.output_ids
        answer.collect(self.recorder, self.req, self.pool)
        return load(answer.handles(self.req)[0])


@pytest.fixture
def recorder() -> recorder_module.Recorder:
    made = recorder_module.Recorder(
        GEOMETRY,
        get_codec("bitset"),
        options=CaptureOptions(),
        store=open_store("inline:"),
        num_slots=32,
        max_tokens_per_pass=8,
        num_fused_shared_experts=0,
        device="cpu",
    )
    assert [made.weight_versions.number(name) for name in ("old", "new")] == [0, 1]
    return made


def _experts(masks: RoutingMasks) -> list[int]:
    return masks.indices()[:, 0].min(-1).values.tolist()


def test_rows_of_what_was_sampled_before_stay(recorder: recorder_module.Recorder) -> None:
    request = Request(recorder)
    request.compute(0, 4, expert=1, first_slot=0)
    request.req.output_ids = [10, 11]
    request.retract()
    # The new prefill covers both sampled tokens; then two more are sampled.
    request.compute(0, 6, expert=5, first_slot=10, version=1)
    request.req.output_ids = [10, 11, 12, 13]
    masks = request.finish()
    # Tokens 0 to 3 gave the log-probabilities of 10 and 11; token 11 itself was fed for the first time afterwards.
    assert _experts(masks) == [1, 1, 1, 1, 5, 5]
    assert masks.valid.all()
    assert masks.weight_versions == ((0, "old"), (4, "new"))
    masks.check_tokens([*PROMPT, 10, 11, 12, 13])


def test_second_retraction_keeps_the_first_rows(recorder: recorder_module.Recorder) -> None:
    request = Request(recorder, start_len=2)
    request.compute(0, 4, expert=1, first_slot=0)
    request.req.output_ids = [10, 11]
    request.retract()
    # In the middle of the prefill its slots hold whatever was there.
    request.compute(0, 5, expert=6, first_slot=20)
    request.retract()
    request.compute(0, 5, expert=3, first_slot=10)
    request.req.output_ids = [10, 11, 12]
    request.retract()
    request.compute(0, 6, expert=5, first_slot=20)
    request.req.output_ids = [10, 11, 12, 13]
    masks = request.finish()
    assert (masks.start, masks.end) == (2, 6)
    assert _experts(masks) == [1, 1, 3, 5]


def test_rows_that_were_unknown_are_filled_in(recorder: recorder_module.Recorder) -> None:
    request = Request(recorder)
    request.compute(0, 3, expert=1, first_slot=0, valid=False)
    request.req.output_ids = [10]
    request.retract()
    request.compute(0, 4, expert=5, first_slot=10)
    request.req.output_ids = [10, 11]
    assert _experts(request.finish()) == [5, 5, 5, 5]


def test_rows_of_tokens_that_were_forgotten_are_not_used(recorder: recorder_module.Recorder) -> None:
    request = Request(recorder)
    request.compute(0, 4, expert=1, first_slot=0)
    request.req.output_ids = [10, 11]
    request.retract()
    request.compute(0, 4, expert=5, first_slot=10)
    request.req.output_ids = [20, 21]
    assert _experts(request.finish()) == [5, 5, 5, 5]


def test_retraction_before_anything_was_sampled_keeps_nothing(recorder: recorder_module.Recorder) -> None:
    request = Request(recorder)
    request.compute(0, 3, expert=1, first_slot=0)
    request.retract()
    request.compute(0, 3, expert=5, first_slot=10)
    request.req.output_ids = [10]
    assert _experts(request.finish()) == [5, 5, 5]
