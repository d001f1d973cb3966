"""What operators see of a server: its page, its internal state and its metrics; and that the counts are right."""

from __future__ import annotations

import io
import json
import urllib.request
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from rich.console import Console

from cpu_engines.sglang.server import Server
from router_replay import __version__
from router_replay_cli.running_server import print_running_server
from sglang_router_capture import http, status
from sglang_router_capture.counts import RowCounts
from tests.sglang_router_capture.requests import generate, masks_of, prompt
from tests.sglang_router_capture.test_recorder_order import Scheduler

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    return Scheduler(monkeypatch, "cpu")


def _get(server: Server, path: str) -> str:
    with urllib.request.urlopen(server.url + path, timeout=60) as answer:
        return answer.read().decode()


def _status(server: Server) -> dict[str, Any]:
    (found,) = json.loads(_get(server, http.PATH))["schedulers"]
    return found


def test_invalid_rows_are_counted_by_cause(scheduler: Scheduler) -> None:
    scheduler.allocate(1, 2, 3, 4)
    scheduler.launch([1, 2], [3, 4]).finalize()
    # A layer says nothing of slot 3; slot 4 is never computed, slot 2 belongs to somebody new.
    scheduler.launch([3], [5], layers=(1,)).finalize()
    scheduler.allocate(2)
    scheduler.recorder.log.settle_all()
    pool = SimpleNamespace(req_to_token=torch.tensor([[1, 2, 3, 4, 0]], dtype=torch.int32))
    scheduler.recorder.get_topk(0, 5, pool)
    assert scheduler.recorder.counts == RowCounts(
        written=3, written_without_routes=1, returned=4, returned_without_routes=1, returned_unrecorded=2
    )


def test_status_is_plain_and_says_what_is_there(scheduler: Scheduler) -> None:
    scheduler.launch([1, 2], [3, 4]).finalize()
    scheduler.launch([3], [5])
    scheduler.allocate(6)
    found = status.status(scheduler.recorder)
    # SGLang sends it by msgpack.
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(found)) == found
    assert found["geometry"] == {"num_layers": 3, "moe_layers": [1, 2], "num_experts": 8, "top_k": 2}
    table = scheduler.recorder.table
    size = table.rows.nbytes + table.valid.nbytes + table.versions.nbytes + table.read_by.nbytes
    assert found["tables"] == {"device": {"slots": 16, "valid": 2, "bytes": size}}
    assert found["log"] == 2
    assert found["weights"] == {"present": "1", "names": 1}
    assert "managers.scheduler.Scheduler.get_internal_state" in found["hooks"]


def test_route_asks_every_scheduler_and_is_there_once() -> None:
    app = FastAPI()

    async def none() -> list[dict[str, Any]]:
        return []

    async def two() -> list[dict[str, Any]]:
        return [{http.STATE_KEY: {"pid": 1}, "other": 2}, {}]

    http.add_route(app, none)
    http.add_route(app, two)
    assert [route.path for route in app.router.routes].count(http.PATH) == 1
    assert TestClient(app).get(http.PATH).json() == {"schedulers": [{"pid": 1}, None]}


def test_page_counts_what_an_answer_had(capture_server: Server) -> None:
    before = _status(capture_server)
    ids = prompt(900, 40)
    masks = masks_of(generate(capture_server, ids, 6), ids)
    after = _status(capture_server)
    assert after["capturer"] == "Recorder"
    assert after["versions"]["rollout-routing-replay"] == __version__
    assert after["codec"] == masks.codec
    assert after["row_bytes"] == masks.rows.shape[1]
    assert after["geometry"]["moe_layers"] == list(masks.geometry.moe_layers)
    assert after["rows"]["returned"] - before["rows"]["returned"] == masks.num_tokens == 45
    # With the overlap schedule a finished request may run one step more.
    assert after["rows"]["written"] - before["rows"]["written"] in (45, 46)
    assert after["rows"]["returned_unrecorded"] == after["rows"]["returned_without_routes"] == 0
    assert after["tables"]["device"]["bytes"] == before["tables"]["device"]["bytes"]
    assert after["tables"]["device"]["slots"] >= 2048


def test_r3_doctor_reads_it(capture_server: Server) -> None:
    told = io.StringIO()
    console = Console(file=told, soft_wrap=True, highlight=False)
    assert print_running_server(console, capture_server.url, None)
    assert "captures scheduler 0: Recorder, format masks, codec rank, " in told.getvalue()
    assert not print_running_server(console, capture_server.url, "sglang")
    assert "another format scheduler 0: Recorder, format masks" in told.getvalue()


def test_server_info_has_it_too(capture_server: Server) -> None:
    (state,) = json.loads(_get(capture_server, "/server_info"))["internal_states"]
    assert state[http.STATE_KEY]["geometry"] == _status(capture_server)["geometry"]


def test_metrics(capture_server: Server) -> None:
    """SGLang writes its own when it logs, so ours may lag behind; a flush makes the scheduler idle."""
    ids = prompt(901, 40)
    masks_of(generate(capture_server, ids, 60), ids)
    lines = [line for line in _get(capture_server, "/metrics").splitlines() if line.startswith("router_capture_")]
    samples = {line.split("{")[0] + (line.partition('event="')[2].partition('"')[0]): line for line in lines}
    assert float(samples["router_capture_rows_totalwritten"].rsplit(" ", 1)[1]) > 0
    assert 'model_name="' in samples["router_capture_rows_totalwritten"]
    size = _status(capture_server)["tables"]["device"]["bytes"]
    assert float(samples["router_capture_table_bytes"].rsplit(" ", 1)[1]) == size
