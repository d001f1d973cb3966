"""The recorder alone, with passes in flight: allocations and passes reach the table in the scheduler's order."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from router_replay.errors import CallOrderError, PairingError
from router_replay.masks import NO_ROW, RoutingGeometry, get_codec, open_store
from sglang_router_capture import recorder as recorder_module
from sglang_router_capture.options import CaptureOptions
from sglang_router_capture.sglang_format import unpacked
from sglang_router_capture.slot_table import SlotTable

GEOMETRY = RoutingGeometry(num_layers=3, moe_layers=(1, 2), num_experts=8, top_k=2)
ALLOCATOR = object()


class Scheduler:
    """Issues passes as SGLang's overlap schedule does: launched in order, finished later."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
        self.version = "1"
        self.device = device
        monkeypatch.setattr(recorder_module, "get_serving", lambda: SimpleNamespace(weight_version=self.version))
        self.recorder = recorder_module.Recorder(
            GEOMETRY,
            get_codec("ordered"),
            options=CaptureOptions(),
            store=open_store("inline:"),
            num_slots=16,
            max_tokens_per_pass=8,
            num_fused_shared_experts=0,
            device=device,
        )
        self.recorder.follow(ALLOCATOR)

    def allocate(self, *slots: int) -> None:
        self.recorder.slots_allocated(ALLOCATOR, torch.tensor(slots, device=self.device))

    def launch(self, slots: list[int], experts: list[int], layers: tuple[int, ...] = (1, 2)) -> Any:
        """A pass whose token i chose experts (e, e + 1) for e = experts[i] in each of `layers`."""
        for layer in layers:
            ids = torch.tensor([[e, e + 1] for e in experts], dtype=torch.int32, device=self.device)
            self.recorder.device_cache.capture(layer, ids)
        batch = SimpleNamespace(out_cache_loc=torch.tensor(slots, device=self.device), out_cache_loc_virtual=None)
        return self.recorder.on_forward_end(batch, False, None, no_copy_to_cpu=True)

    def table(self, *slots: int) -> list[int | None]:
        """First expert of layer 1 per slot; None where the row is not valid."""
        rows, valid, _ = self.recorder.table.read(torch.tensor(slots))
        first = self.recorder.codec.unpack_valid(rows, valid, GEOMETRY)[:, 0, 0]
        return [int(expert) if ok else None for expert, ok in zip(first, valid, strict=True)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def scheduler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    return Scheduler(monkeypatch, request.param)


def test_slots_are_invalid_until_their_pass_is_done(scheduler: Scheduler) -> None:
    scheduler.allocate(1, 2)
    record = scheduler.launch([1, 2], [3, 4])
    assert scheduler.table(1, 2, 5) == [None, None, None]
    record.finalize()
    assert scheduler.table(1, 2, 5) == [3, 4, None]


def test_late_write_of_a_finished_request_does_not_survive_the_slots_new_owner(scheduler: Scheduler) -> None:
    scheduler.allocate(7)
    extra_step = scheduler.launch([7], [5])
    # The request turns out to be finished; slot 7 goes to a request whose KV is loaded and not computed.
    scheduler.allocate(7, 8)
    following = scheduler.launch([8], [1])
    extra_step.finalize()
    following.finalize()
    assert scheduler.table(7, 8) == [None, 1]


def test_rows_of_a_slots_former_owner_are_not_handed_out(scheduler: Scheduler) -> None:
    scheduler.launch([3, 4], [2, 6]).finalize()
    scheduler.allocate(3)
    scheduler.launch([5], [1]).finalize()
    rows, valid, _ = scheduler.recorder.table.read(torch.tensor([3, 4, 9]))
    assert valid.tolist() == [False, True, False]
    assert (rows == NO_ROW).all(1).tolist() == [True, False, True]


def test_a_dropped_result_still_releases_and_writes_in_order(scheduler: Scheduler) -> None:
    scheduler.allocate(3)
    scheduler.launch([3], [2]).finalize()
    scheduler.allocate(3, 4)
    scheduler.launch([4], [6])
    last = scheduler.launch([5], [1])
    last.finalize()
    assert scheduler.table(3, 4, 5) == [None, 6, 1]


def test_a_result_that_comes_twice_or_late_settles_nothing_else(scheduler: Scheduler) -> None:
    first, second = scheduler.launch([1], [2]), scheduler.launch([2], [3])
    second.finalize()
    third = scheduler.launch([3], [4])
    first.finalize()
    second.finalize()
    assert scheduler.table(1, 2, 3) == [2, 3, None]
    third.finalize()
    assert scheduler.table(3) == [4]


def test_allocations_of_another_allocator_are_not_ours(scheduler: Scheduler) -> None:
    scheduler.allocate(3)
    scheduler.launch([3], [2]).finalize()
    scheduler.recorder.slots_allocated(object(), torch.tensor([3], device=scheduler.device))
    scheduler.launch([4], [6]).finalize()
    assert scheduler.table(3) == [2]


def test_an_allocators_tensor_may_change_after_the_call(scheduler: Scheduler) -> None:
    scheduler.launch([1, 2], [3, 4]).finalize()
    slots = torch.tensor([1], device=scheduler.device)
    scheduler.recorder.slots_allocated(ALLOCATOR, slots)
    slots.fill_(2)
    scheduler.launch([9], [0]).finalize()
    assert scheduler.table(1, 2) == [None, 4]


def test_a_layer_that_reports_nothing_makes_the_row_invalid(
    scheduler: Scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler.launch([1], [3]).finalize()
    scheduler.launch([2, 3], [4, 5], layers=(1,)).finalize()
    assert scheduler.table(1, 2, 3) == [3, None, None]
    assert "2 of 2 tokens of a forward pass have no route" in caplog.text


def test_what_a_padded_pass_left_behind_is_nobodys_route(scheduler: Scheduler) -> None:
    """A graph's layers write the rows of its padding, which no pass reads; a layer that then reports nothing shows."""
    for layer in (1, 2):
        ids = torch.tensor([[0, 1]] * 8, dtype=torch.int32, device=scheduler.device)
        scheduler.recorder.device_cache.capture(layer, ids)
    scheduler.launch([1, 2], [3, 4]).finalize()
    scheduler.launch([3, 4, 5, 6], [2, 2, 2, 2], layers=(1,)).finalize()
    assert scheduler.table(1, 2, 3, 4, 5, 6) == [3, 4, None, None, None, None]


def test_padded_experts_make_the_row_invalid(scheduler: Scheduler) -> None:
    scheduler.launch([1, 2], [3, -1]).finalize()
    assert scheduler.table(1, 2) == [3, None]


def test_an_expert_twice_makes_the_row_invalid(scheduler: Scheduler) -> None:
    for layer in (1, 2):
        ids = torch.tensor([[3, 4], [5, 5]], dtype=torch.int32, device=scheduler.device)
        scheduler.recorder.device_cache.capture(layer, ids)
    batch = SimpleNamespace(out_cache_loc=torch.tensor([1, 2], device=scheduler.device), out_cache_loc_virtual=None)
    scheduler.recorder.on_forward_end(batch, False, None, no_copy_to_cpu=True).finalize()
    assert scheduler.table(1, 2) == [3, None]


def test_a_dense_layer_that_routes_is_refused(scheduler: Scheduler) -> None:
    with pytest.raises(PairingError, match=r"decoder layer 0 routes .* only layers \(1, 2\)"):
        scheduler.launch([1], [3], layers=(0,))


def test_rows_remember_the_weights_that_computed_them(scheduler: Scheduler) -> None:
    scheduler.launch([1], [3]).finalize()
    in_flight = scheduler.launch([2], [3])
    scheduler.version = "2"
    scheduler.launch([3], [3]).finalize()
    assert in_flight.settled
    _, _, versions = scheduler.recorder.table.read(torch.tensor([1, 2, 3]))
    assert [scheduler.recorder.weight_versions.name(number) for number in versions.tolist()] == ["1", "1", "2"]


def test_upstreams_format_has_no_plausible_row_for_an_unknown_token(scheduler: Scheduler) -> None:
    scheduler.launch([1, 3], [3, 5]).finalize()
    pool = SimpleNamespace(req_to_token=torch.tensor([[1, 2, 3, 4]], dtype=torch.int32))
    routes = unpacked(scheduler.recorder.get_topk(0, 4, pool))
    assert routes.dtype == torch.int32
    assert routes.tolist() == [
        [[0, 0], [3, 4], [3, 4]],
        [[0, 0], [-1, -1], [-1, -1]],
        [[0, 0], [5, 6], [5, 6]],
    ]


def test_what_the_log_holds_is_applied_when_no_batch_runs(scheduler: Scheduler) -> None:
    scheduler.allocate(1, 2)
    scheduler.launch([1], [3])
    scheduler.launch([2], [4]).finalize()
    scheduler.launch([5], [6])
    scheduler.allocate(1)
    assert scheduler.table(1, 2, 5) == [3, 4, None]
    scheduler.recorder.log.settle_all()
    assert scheduler.table(1, 2, 5) == [None, 4, 6]
    assert len(scheduler.recorder.log) == 0


def test_the_log_does_not_grow_where_nobody_asks_for_results(scheduler: Scheduler) -> None:
    sizes = []
    for step in range(100):
        scheduler.allocate(step % 8)
        scheduler.launch([step % 8], [step % 7])
        sizes.append(len(scheduler.recorder.log))
    assert max(sizes) <= 2 * 33
    scheduler.recorder.log.settle_all()
    # 99 % 8 is 3, 99 % 7 is 1.
    assert scheduler.table(3) == [1]


def test_copies_between_tables_stand_in_the_order_of_the_passes(scheduler: Scheduler) -> None:
    table, log = scheduler.recorder.table, scheduler.recorder.log
    host = SlotTable(8, table.rows.shape[1])

    def slots(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, device=scheduler.device)

    scheduler.launch([1, 2], [3, 4])
    log.append(partial(host.copy_from, table), slots(1, 2), slots(5, 6))
    # The device's slots change hands and are computed anew, while the host keeps what they held.
    scheduler.allocate(1, 2)
    scheduler.launch([1, 2], [0, 1])
    log.append(host.release, slots(5))
    scheduler.allocate(9, 10, 11)
    log.append(partial(table.copy_from, host), slots(5, 6), slots(9, 10))
    log.append(partial(table.copy_from, table), slots(10, 1), slots(1, 11))
    scheduler.launch([12], [6]).finalize()
    assert scheduler.table(1, 2, 9, 10, 11, 12) == [4, 1, None, 4, 0, 6]


def test_without_its_allocator_the_recorder_does_not_record(scheduler: Scheduler) -> None:
    scheduler.recorder.follow(None)
    with pytest.raises(CallOrderError, match="which KV allocator to follow"):
        scheduler.launch([1], [3])
