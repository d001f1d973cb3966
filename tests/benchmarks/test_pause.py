"""What `python -m benchmarks.pause` records and makes of it; the servers that it starts are tested elsewhere."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.interleaved import Seconds
from benchmarks.pause.figures import summary, targets
from benchmarks.pause.probe import router_capture_pause as probe
from benchmarks.pause.rounds import AGAIN, QUIET, WITH, WITHOUT, Pause, Round
from benchmarks.pause.servers import FILE, INLINE, SLOW, STOCK
from router_replay.masks import load, open_store
from tests.router_replay.masks.test_container import make_masks


class Processor:
    """Of a batch's results, as SGLang's: requests that end are collected, then sent."""

    def __init__(self, streamer: Streamer, table: Table | None = None) -> None:
        self.streamer, self.table = streamer, table

    def process_batch_result_decode(self, reqs: list[Any]) -> None:
        if self.table is not None:
            self.table.write()
        for req in reqs:
            self._maybe_collect_routed_experts(req)
        self.streamer.stream_output(reqs)

    def process_batch_result_prefill(self, reqs: list[Any]) -> None:
        self.streamer.stream_output(reqs)

    def _maybe_collect_routed_experts(self, req: Any) -> None:
        time.sleep(0.002)


class Streamer:
    def stream_output(self, reqs: list[Any]) -> None:
        time.sleep(0.001)


class Table:
    def write(self) -> None:
        time.sleep(0.003)

    def release(self) -> None: ...


def request(tokens: int, asked: bool) -> Any:
    return SimpleNamespace(origin_input_ids=[0] * tokens, return_routed_experts=asked)


def test_what_the_thread_did_for_each_batch_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    components = "sglang.srt.managers.scheduler_components"
    # Of their own for this test, since they are changed.
    timed: list[Any] = [type(owner.__name__, (owner,), {}) for owner in (Processor, Streamer, Table)]
    for owner, module, name in zip(
        timed,
        (f"{components}.batch_result_processor", f"{components}.output_streamer", "sglang_router_capture.slot_table"),
        ("SchedulerBatchResultProcessor", "SchedulerOutputStreamer", "SlotTable"),
        strict=True,
    ):
        fake = ModuleType(module)
        setattr(fake, name, owner)
        monkeypatch.setitem(sys.modules, module, fake)
    records = io.StringIO()
    probe.measure(records, 100)
    processor = timed[0](timed[1](), timed[2]())
    before = time.monotonic()
    processor.process_batch_result_decode(
        [request(100, True), request(200, True), request(200, False), request(5, True)]
    )
    processor.process_batch_result_prefill([])
    first, second = map(json.loads, records.getvalue().splitlines())
    assert (first["ended"], first["asked"], len(first["collected"])) == (3, 2, 2)
    assert before <= first["at"] <= second["at"] <= time.monotonic()
    assert all(wall >= 0.002 > cpu for wall, cpu in first["collected"])
    assert first["sent"][0] >= 0.001 and first["table"][0] >= 0.003 and first["whole"][0] >= 0.012
    assert (second["ended"], second["collected"], second["table"]) == (0, [], [0.0, 0.0])
    pause = Pause.of([first, second])
    assert (pause.requests, pause.steps) == (3, 1)
    assert 0.005 <= pause.seconds.wall <= first["whole"][0]


def test_the_slow_store_is_a_store_that_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe.supply_slow_store()
    masks = make_masks()
    with open_store(f"{probe.SLOW}://{tmp_path}/r3") as store:
        store.prepare()
        monkeypatch.setenv(probe.SLOW_SECONDS, "0.2")
        began = time.monotonic()
        handle = store.put(masks)
        assert time.monotonic() - began >= 0.2
        assert [path.suffix for path in (tmp_path / "r3").iterdir()] == [".safetensors"]
        assert torch.equal(load(handle).rows, masks.rows)
        store.delete(handle)
    assert list((tmp_path / "r3").iterdir()) == []


def rounds(*, with_routes: float, again: float, pause: float = 0.001) -> list[Round]:
    one, together = (Pause(number, 1, Seconds(number * pause, number * pause / 2)) for number in (1, 32))
    return [
        Round(
            single={True: [one], False: [one]},
            together={True: together, False: together},
            first_tokens={QUIET: [0.1], WITHOUT: [0.1, 0.1, 0.9], WITH: [0.1 * with_routes], AGAIN: [0.1 * again]},
            table={True: 0.002, False: 0.001},
        )
    ] * 3


def test_others_may_wait_as_much_longer_as_without_routes() -> None:
    fine = summary(rounds(with_routes=1.04, again=1.05))
    assert fine["one"]["wall"] == pytest.approx(1.0) and fine["together"]["cpu"] == pytest.approx(16.0)
    assert fine["table_ms"] == {"with": pytest.approx(2.0), "without": pytest.approx(1.0)}
    late = summary(rounds(with_routes=1.06, again=1.05))
    slow = summary(rounds(with_routes=1.0, again=1.0, pause=0.004))
    found = {STOCK: fine, INLINE: fine, FILE: slow}
    assert [aim["holds"] for aim in targets({**found, SLOW: fine}).values()] == [
        True,
        True,
        False,
        False,
        True,
        True,
        True,
    ]
    assert [aim["holds"] for aim in targets({**found, SLOW: late}).values()][-1] is False
