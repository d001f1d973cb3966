"""Rows that follow the KV through HiCache, without an engine: copies and hand-outs in the order of the log."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from router_replay.errors import UnsupportedError
from sglang_router_capture import live_refusals
from sglang_router_capture.follow.hicache import HiCacheFollower
from sglang_router_capture.hooks import hicache as hooks
from tests.sglang_router_capture.test_recorder_order import GEOMETRY, Scheduler

DEVICE_POOL, HOST_POOL = object(), SimpleNamespace(logical_size=8)


class HostScheduler(Scheduler):
    """A scheduler with a host pool: copies are submitted as SGLang's controllers do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
        super().__init__(monkeypatch, device)
        self.follower = HiCacheFollower(self.recorder.log, self.recorder.table, DEVICE_POOL, HOST_POOL)

    def allocate_host(self, *slots: int) -> None:
        self.follower.slots_allocated(HOST_POOL, torch.tensor(slots))

    def transfer(self, device: list[int], host: list[int], **fields: Any) -> SimpleNamespace:
        named = {"host_pool": HOST_POOL, "device_pool": DEVICE_POOL, "is_draft": False, **fields}
        indices = {"device_indices": torch.tensor(device, device=self.device), "host_indices": torch.tensor(host)}
        return SimpleNamespace(**named, **indices)

    def to_host(self, device: list[int], host: list[int], **fields: Any) -> None:
        self.follower.copied_to_host([self.transfer(device, host, **fields)])

    def to_device(self, host: list[int], device: list[int], **fields: Any) -> None:
        self.follower.copied_to_device([self.transfer(device, host, **fields)])

    def host_table(self, *slots: int) -> list[int | None]:
        """As `table`, of the host."""
        rows, valid, _ = self.follower.table.read(torch.tensor(slots))
        first = self.recorder.codec.unpack_valid(rows, valid, GEOMETRY)[:, 0, 0]
        return [int(expert) if ok else None for expert, ok in zip(first, valid, strict=True)]

    def idle(self) -> None:
        self.recorder.log.settle_all()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def scheduler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HostScheduler:
    return HostScheduler(monkeypatch, request.param)


def test_rows_make_any_number_of_trips(scheduler: HostScheduler) -> None:
    scheduler.allocate(1, 2)
    scheduler.launch([1, 2], [3, 4])
    host, device = [5, 6], [1, 2]
    scheduler.allocate_host(*host)
    scheduler.to_host(device, host)
    for trip in range(4):
        # Others take the device's slots, and the next trip ends in new ones, in another order.
        scheduler.allocate(*device)
        scheduler.launch(device, [0, 0])
        device = [7 + trip, 3 + trip]
        scheduler.allocate(*device)
        scheduler.to_device(host, device)
        scheduler.launch([15], [6]).finalize()
        assert scheduler.table(*device) == [3, 4]
        host = [trip, 7 - trip]
        scheduler.allocate_host(*host)
        scheduler.to_host(device, host)
    scheduler.idle()
    assert scheduler.host_table(*host) == [3, 4]
    counters = scheduler.follower.counters
    assert (counters.rows_to_host, counters.rows_from_host) == (10, 8)


def test_a_copy_right_after_the_last_request_is_applied_when_idle(scheduler: HostScheduler) -> None:
    scheduler.launch([1], [3]).finalize()
    scheduler.allocate_host(5)
    scheduler.to_host([1], [5])
    assert scheduler.host_table(5) == [None]
    scheduler.idle()
    assert scheduler.host_table(5) == [3]


def test_a_host_slot_that_changed_hands_does_not_take_the_former_occupants_row(scheduler: HostScheduler) -> None:
    """The former occupant's copy still stands in the log when the slot is handed out again."""
    scheduler.launch([1], [3])
    scheduler.allocate_host(5)
    scheduler.to_host([1], [5])
    # Evicted, and given to a page that storage will fill: its rows are not known yet.
    scheduler.allocate_host(5)
    scheduler.allocate(9)
    scheduler.to_device([5], [9])
    scheduler.launch([2], [4]).finalize()
    assert scheduler.host_table(5) == [None]
    assert scheduler.table(9) == [None]


def test_a_slot_that_is_computed_anew_after_its_copy_leaves_the_copy_as_it_is(scheduler: HostScheduler) -> None:
    scheduler.launch([1], [3])
    scheduler.allocate_host(5)
    scheduler.to_host([1], [5])
    scheduler.allocate(1)
    scheduler.launch([1], [6]).finalize()
    assert scheduler.host_table(5) == [3]
    assert scheduler.table(1) == [6]


def test_the_pass_behind_the_copy_writes_beside_what_was_loaded(scheduler: HostScheduler) -> None:
    scheduler.launch([1, 2], [3, 4]).finalize()
    scheduler.allocate_host(5, 6)
    scheduler.to_host([1, 2], [5, 6])
    scheduler.allocate(11, 12, 13)
    # A part of the node comes back; the third slot is computed.
    scheduler.to_device([5, 6], [11, 12])
    scheduler.launch([13], [0]).finalize()
    assert scheduler.table(11, 12, 13) == [3, 4, 0]


def test_rows_that_are_not_valid_stay_so(scheduler: HostScheduler) -> None:
    scheduler.launch([1, 2], [3, -1]).finalize()
    scheduler.allocate_host(5, 6)
    scheduler.to_host([1, 2], [5, 6])
    scheduler.allocate(11, 12)
    scheduler.to_device([5, 6], [11, 12])
    scheduler.idle()
    assert scheduler.table(11, 12) == [3, None]


def test_copies_keep_the_weights_names(scheduler: HostScheduler) -> None:
    scheduler.launch([1], [3]).finalize()
    scheduler.version = "2"
    scheduler.allocate_host(5)
    scheduler.to_host([1], [5])
    scheduler.allocate(11)
    scheduler.to_device([5], [11])
    scheduler.launch([12], [3]).finalize()
    _, _, versions = scheduler.recorder.table.read(torch.tensor([11, 12]))
    assert [scheduler.recorder.weight_versions.name(number) for number in versions.tolist()] == ["1", "2"]


@pytest.mark.parametrize("fields", [{"host_pool": object()}, {"device_pool": object()}, {"is_draft": True}])
def test_copies_of_other_pools_are_not_ours(scheduler: HostScheduler, fields: dict[str, Any]) -> None:
    scheduler.launch([1, 2], [3, 4]).finalize()
    scheduler.allocate_host(5)
    scheduler.to_host([1], [5])
    scheduler.to_host([2], [5], **fields)
    scheduler.to_device([5], [2], **fields)
    scheduler.idle()
    assert scheduler.host_table(5) == [3]
    assert scheduler.table(2) == [4]


def test_hand_outs_of_other_host_pools_are_not_ours(scheduler: HostScheduler) -> None:
    scheduler.launch([1], [3]).finalize()
    scheduler.allocate_host(5)
    scheduler.to_host([1], [5])
    scheduler.follower.slots_allocated(object(), torch.tensor([5]))
    scheduler.follower.slots_allocated(HOST_POOL, None)
    scheduler.idle()
    assert scheduler.host_table(5) == [3]


def test_indices_may_change_after_the_call(scheduler: HostScheduler) -> None:
    scheduler.launch([1, 2], [3, 4]).finalize()
    scheduler.allocate_host(5, 6)
    transfer = scheduler.transfer([1, 2], [5, 6])
    scheduler.follower.copied_to_host([transfer])
    transfer.device_indices.fill_(9)
    transfer.host_indices.fill_(0)
    scheduler.idle()
    assert scheduler.host_table(5, 6) == [3, 4]


class Allocator:
    def __init__(self, kv_pool: Any) -> None:
        self.kv_pool = kv_pool

    def get_kvcache(self) -> Any:
        return self.kv_pool


def _host_pool(**members: Any) -> Any:
    from sglang.srt.mem_cache.pool_host.base import HostKVCache

    pool_class = type("SomeHostPool", (HostKVCache,), members)
    pool_class.__abstractmethods__ = frozenset()
    return object.__new__(pool_class)


def _alloc(self: Any, need_size: int) -> Tensor:
    return torch.arange(need_size)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"alloc": _alloc}, "by a method of its own, which is not heard"),
        ({"dcp_size": 2}, "2 ranks share its slots"),
        ({"prepare_transfer_indices": _alloc}, "its entries move"),
        ({"shared_allocation_domain": object()}, "its entries move"),
    ],
)
def test_pools_that_cannot_be_followed_are_refused(members: dict[str, Any], words: str) -> None:
    kv_pool = SimpleNamespace()
    live_refusals.require_supported_host_pool(_host_pool(), kv_pool, Allocator(kv_pool))
    with pytest.raises(UnsupportedError, match=f"host pool SomeHostPool: .*{words}.*without router capture"):
        live_refusals.require_supported_host_pool(_host_pool(**members), kv_pool, Allocator(kv_pool))
    moving = SimpleNamespace(host_transfer_translate=_alloc)
    with pytest.raises(UnsupportedError, match="its entries move"):
        live_refusals.require_supported_host_pool(_host_pool(), moving, Allocator(moving))
    with pytest.raises(UnsupportedError, match="not all of the int"):
        live_refusals.require_supported_host_pool(_host_pool(), kv_pool, Allocator(0))


def test_a_controller_without_a_group_of_pools_is_refused_by_the_same_rules(
    scheduler: HostScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "recorder_of_this_process", lambda: scheduler.recorder)
    kv_pool = SimpleNamespace()
    allocator = Allocator(kv_pool)
    controller = SimpleNamespace(
        mem_pool_device_allocator=allocator,
        mem_pool_device=kv_pool,
        mem_pool_host=_host_pool(alloc=_alloc),
        storage_backend_type=None,
    )
    # Of another allocator, such as a draft's: not ours to judge.
    hooks.after_controller_init(None, controller)
    assert scheduler.recorder.hicache is None
    scheduler.recorder.follow(allocator)
    with pytest.raises(SystemExit, match="SomeHostPool"):
        hooks.after_controller_init(None, controller)
    controller.mem_pool_host = _host_pool(logical_size=8)
    hooks.after_controller_init(None, controller)
    assert scheduler.recorder.hicache is not None
    assert len(scheduler.recorder.hicache.table.valid) == 8


@pytest.mark.parametrize(("tp_size", "pp_size", "carries"), [(1, 1, True), (2, 1, False), (1, 2, False)])
def test_rows_go_to_storage_where_one_rank_holds_whole_pages(
    scheduler: HostScheduler, monkeypatch: pytest.MonkeyPatch, tp_size: int, pp_size: int, carries: bool
) -> None:
    monkeypatch.setattr(hooks, "recorder_of_this_process", lambda: scheduler.recorder)
    kv_pool = SimpleNamespace()
    allocator = Allocator(kv_pool)
    scheduler.recorder.follow(allocator)
    controller = SimpleNamespace(
        mem_pool_device_allocator=allocator,
        mem_pool_device=kv_pool,
        mem_pool_host=_host_pool(logical_size=8),
        storage_backend_type="file",
        storage_config=SimpleNamespace(tp_size=tp_size, pp_size=pp_size),
    )
    hooks.after_controller_init(None, controller)
    assert scheduler.recorder.hicache is not None
    assert (scheduler.recorder.hicache.storage is not None) == carries
