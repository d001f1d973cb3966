"""Stages of a pipeline without an engine: their messages, and what the first stage makes of them."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from router_replay.errors import PairingError
from router_replay.masks import RoutingGeometry, get_codec, open_store
from sglang_router_capture import recorder as recorder_module
from sglang_router_capture.follow.pipeline import PASS_KEY, ROWS_KEY, FirstStage, LaterStage
from sglang_router_capture.options import CaptureOptions
from sglang_router_capture.staging import Staging

GEOMETRY = RoutingGeometry(num_layers=5, moe_layers=(1, 2, 3, 4), num_experts=300, top_k=2)
LAYERS = ((1,), (2, 3), (4,))
ALLOCATOR = object()


class Pipeline:
    """Three stages that run the same batches; what travels between them goes through the test's hands."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recorder_module, "get_serving", lambda: SimpleNamespace(weight_version="1"))
        self.first = FirstStage(
            GEOMETRY,
            get_codec("ordered"),
            options=CaptureOptions(),
            store=open_store("inline:"),
            num_slots=16,
            max_tokens_per_pass=8,
            num_fused_shared_experts=0,
            device="cpu",
            layers=LAYERS[0],
        )
        self.first.follow(ALLOCATOR)
        self.later = [LaterStage(Staging(GEOMETRY, 8, 0, "cpu", layers), GEOMETRY, 0) for layers in LAYERS[1:]]

    def forward(self, stage: int, slots: list[int], expert: int) -> None:
        """A stage's pass: token i of it chose experts (e, e + 1) in its layer number l, for e = expert + 10 i + l."""
        capturer = (self.first, *self.later)[stage]
        for layer in LAYERS[stage]:
            first = torch.arange(len(slots)) * 10 + expert + layer
            capturer.device_cache.capture(layer, torch.stack([first, first + 1], dim=1))
        batch = SimpleNamespace(out_cache_loc=torch.tensor(slots), out_cache_loc_virtual=None)
        assert capturer.on_forward_end(batch, False, None, no_copy_to_cpu=False) is None

    def launch(self, slots: list[int], expert: int) -> dict[str, Any]:
        """A pass on all stages; what comes back to the first with the result."""
        self.forward(0, slots, expert)
        message = self.first.outgoing()
        for stage, later in enumerate(self.later, 1):
            later.received(message.get(PASS_KEY), message.get(ROWS_KEY))
            self.forward(stage, slots, expert)
            message = later.outgoing()
        return message

    def back(self, message: dict[str, Any]) -> None:
        self.first.returned(message.get(PASS_KEY), message.get(ROWS_KEY))

    def table(self, *slots: int) -> list[list[int] | None]:
        """First expert of each layer, by slot; None where the row is not valid."""
        rows, valid, _ = self.first.table.read(torch.tensor(slots))
        experts: Tensor = self.first.codec.unpack_valid(rows, valid, GEOMETRY)[:, :, 0]
        return [row.tolist() if ok else None for row, ok in zip(experts, valid, strict=True)]


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    return Pipeline(monkeypatch)


def test_a_row_has_the_layers_of_all_stages_in_their_order(pipeline: Pipeline) -> None:
    message = pipeline.launch([5, 3], 270)
    assert pipeline.table(5, 3) == [None, None]
    pipeline.back(message)
    assert pipeline.table(5, 3) == [[271, 272, 273, 274], [281, 282, 283, 284]]


def test_passes_in_flight_keep_their_own_layers(pipeline: Pipeline) -> None:
    messages = [pipeline.launch([1, 2], 20), pipeline.launch([3], 50), pipeline.launch([4], 90)]
    for message in messages:
        pipeline.back(message)
    assert pipeline.table(1, 2, 3, 4) == [[21, 22, 23, 24], [31, 32, 33, 34], [51, 52, 53, 54], [91, 92, 93, 94]]


def test_slots_that_changed_hands_while_a_pass_was_under_way(pipeline: Pipeline) -> None:
    message = pipeline.launch([1, 2], 20)
    pipeline.first.slots_allocated(ALLOCATOR, torch.tensor([2]))
    following = pipeline.launch([7], 50)
    pipeline.back(message)
    pipeline.back(following)
    assert pipeline.table(1, 2, 7) == [[21, 22, 23, 24], None, [51, 52, 53, 54]]


def test_passes_under_way_are_not_given_up_for_a_pause(pipeline: Pipeline) -> None:
    message = pipeline.launch([1], 20)
    pipeline.first.settle()
    pipeline.back(message)
    assert pipeline.table(1) == [[21, 22, 23, 24]]
    pipeline.first.slots_allocated(ALLOCATOR, torch.tensor([1]))
    pipeline.first.settle()
    assert pipeline.table(1) == [None]


def test_a_result_that_does_not_come_back_leaves_no_rows_and_the_next_ones_right(pipeline: Pipeline) -> None:
    pipeline.launch([1], 20)
    pipeline.back(pipeline.launch([2], 50))
    assert pipeline.table(1, 2) == [None, [51, 52, 53, 54]]


def test_a_stage_that_ran_other_slots_makes_the_row_invalid(pipeline: Pipeline) -> None:
    pipeline.forward(0, [1, 2], 20)
    number = pipeline.first.outgoing()[PASS_KEY]
    pipeline.later[0].received(number, None)
    pipeline.forward(1, [1, 9], 20)
    message = pipeline.later[0].outgoing()
    pipeline.later[1].received(number, message[ROWS_KEY])
    pipeline.forward(2, [1, 2], 20)
    pipeline.back(pipeline.later[1].outgoing())
    assert pipeline.table(1, 2, 9) == [[21, 22, 23, 24], None, None]


def test_a_stage_whose_layers_are_missing_makes_the_rows_invalid(pipeline: Pipeline) -> None:
    pipeline.forward(0, [1], 20)
    number = pipeline.first.outgoing()[PASS_KEY]
    pipeline.later[1].received(number, None)
    pipeline.forward(2, [1], 20)
    pipeline.back(pipeline.later[1].outgoing())
    assert pipeline.table(1) == [None]


def test_a_later_layer_that_reports_nothing_makes_the_row_invalid(pipeline: Pipeline) -> None:
    pipeline.forward(0, [1], 20)
    number = pipeline.first.outgoing()[PASS_KEY]
    pipeline.later[0].received(number, None)
    batch = SimpleNamespace(out_cache_loc=torch.tensor([1]), out_cache_loc_virtual=None)
    pipeline.later[0].device_cache.capture(2, torch.tensor([[3, 4]]))
    pipeline.later[0].on_forward_end(batch, False, None)
    message = pipeline.later[0].outgoing()
    pipeline.later[1].received(number, message[ROWS_KEY])
    pipeline.forward(2, [1], 20)
    pipeline.back(pipeline.later[1].outgoing())
    assert pipeline.table(1) == [None]


def test_the_first_stage_keeps_nothing_of_passes_that_are_done(pipeline: Pipeline) -> None:
    for step in range(100):
        pipeline.back(pipeline.launch([step % 8], step))
    assert not pipeline.first._waiting
    assert len(pipeline.first.log) == 0


def test_a_stage_without_moe_layers_passes_on_what_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.sglang_router_capture.test_pipeline_rows.LAYERS", ((), (1, 2, 3), (4,)))
    pipeline = Pipeline(monkeypatch)
    pipeline.back(pipeline.launch([6], 40))
    assert pipeline.table(6) == [[41, 42, 43, 44]]


@pytest.mark.parametrize("layers", [*LAYERS, ()])
def test_a_stage_alone_has_no_whole_row(layers: tuple[int, ...]) -> None:
    staging = Staging(GEOMETRY, 8, 0, "cpu", layers)
    for layer in layers:
        staging.capture(layer, torch.tensor([[5, 6]]))
    with pytest.raises(PairingError, match=rf"layers \(1, 2, 3, 4\), but only {re.escape(str(layers))} run here"):
        staging.take_rows(get_codec("ordered"), 0, 1)
    indices, valid = staging.take(0, 1)
    assert indices.tolist() == [[[5, 6]] * len(layers)] and bool(valid.all())
