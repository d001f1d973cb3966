"""Rows beside the pages of SGLang's own file storage, without an engine: which are found, and which must not be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.cache_controller import HiCacheController
from torch import Tensor

from router_replay.errors import DataError
from router_replay.masks import RoutingGeometry, get_codec
from sglang_router_capture import wrappers
from sglang_router_capture.follow import storage as storage_module
from sglang_router_capture.follow.counters import HiCacheCounters
from sglang_router_capture.follow.page_rows import PageRows, packed_size
from sglang_router_capture.follow.storage import StoredRows
from sglang_router_capture.hooks import HOOKS, hicache
from sglang_router_capture.log import Log
from sglang_router_capture.slot_table import SlotTable

GEOMETRY = RoutingGeometry(num_layers=3, moe_layers=(1, 2), num_experts=8, top_k=2)
PAGE = 4


class HostPool:
    """KV of 16 host slots, one number each."""

    layout = "layer_first"
    dtype = torch.float32

    def __init__(self) -> None:
        self.kv = torch.zeros(16)

    def get_data_page(self, index: int, flat: bool = True) -> Tensor:
        return self.kv[index : index + PAGE]


class Server:
    """One server's side of a storage: its log, its table of host rows, and its controller."""

    def __init__(self, folder: Path, codec: str = "ordered", layout: str = "layer_first", **extra: Any) -> None:
        from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

        config = HiCacheStorageConfig(0, 1, 0, 1, 0, 1, False, False, False, "model", extra_config=extra)
        self.log = Log("cpu")
        self.codec = get_codec(codec)
        self.table = SlotTable(16, self.codec.row_bytes(GEOMETRY))
        self.names: list[str] = []
        self.counters = HiCacheCounters()
        self.pool = HostPool()
        self.pool.layout = layout
        self.controller = SimpleNamespace(
            page_size=PAGE,
            storage_host_pool=self.pool,
            storage_stop_event=threading.Event(),
            storage_backend=HiCacheFile(config, file_path=str(folder)),
        )
        self.stored = StoredRows(
            self.log,
            self.table,
            GEOMETRY,
            self.codec,
            version_name=lambda number: self.names[number],
            version_number=self.number,
            counters=self.counters,
        )

    def number(self, name: str) -> int:
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)

    def compute(self, first: int, kv: float, experts: list[int], name: str = "1") -> None:
        """Host slots from `first` on get the KV and the rows of a pass."""
        slots = torch.arange(first, first + len(experts))
        self.pool.kv[slots] = kv + torch.arange(len(experts))
        chosen = torch.tensor(experts)
        rows = self.codec.pack(torch.stack([chosen, chosen + 1], -1)[:, None].repeat(1, 2, 1) % 8, GEOMETRY)
        self.log.append(lambda *row: self.table.write(*row, self.number(name)), slots, rows, chosen >= 0)

    def operation(self, keys: list[str], first: int) -> SimpleNamespace:
        """Pages with these keys, in the slots from `first` on, are to be stored."""
        slots = torch.arange(first, first + PAGE * len(keys))
        made = SimpleNamespace(hash_value=keys, host_indices=slots, completed_tokens=0, prefix_keys=None)
        self.stored.snapshot(made, slots)
        return made

    def finish(self, operation: SimpleNamespace) -> None:
        """SGLang's backup thread calls us, and then stores the pages."""
        self.stored.store(self.controller, operation)
        slots = operation.host_indices.split(PAGE)
        for key, page in zip(operation.hash_value, slots, strict=True):
            assert self.controller.storage_backend.set(key, self.pool.get_data_page(int(page[0])))

    def store(self, keys: list[str], first: int = 0) -> None:
        operation = self.operation(keys, first)
        self.log.settle_all()
        self.finish(operation)

    def load(self, keys: list[str], first: int = 8) -> list[tuple[int, str] | None]:
        """Read pages into new slots; first expert and weights of each, None where the row is not valid."""
        slots = torch.arange(first, first + PAGE * len(keys))
        self.log.append(self.table.release, slots)
        for key, page in zip(keys, slots.split(PAGE), strict=True):
            data = self.controller.storage_backend.get(key, torch.empty(PAGE))
            assert data is not None
            self.pool.kv[page] = data
        self.stored.load(self.controller, keys, slots)
        self.log.settle_all()
        rows, valid, versions = self.table.read(slots)
        experts = self.codec.unpack_valid(rows, valid, GEOMETRY)[:, 0, 0].tolist()
        found = zip(experts, valid.tolist(), versions.tolist(), strict=True)
        return [(expert, self.names[version]) if ok else None for expert, ok, version in found]


class Backup(HiCacheController):
    """SGLang's controller with nothing but its way of storing pages."""

    _page_backup = HiCacheController._page_backup

    def __init__(self, server: Server, stored: Callable[[list[str], torch.Tensor], None]) -> None:
        self.__dict__.update(vars(server.controller))
        self._server, self._stored = server, stored

    def page_set_func(self, keys: list[str], slots: torch.Tensor, extra_info: Any) -> bool:
        for key, page in zip(keys, slots.split(PAGE), strict=True):
            assert self.storage_backend.set(key, self._server.pool.get_data_page(int(page[0])))
        self._stored(keys, slots)
        return True


def test_whoever_sees_a_page_finds_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server, or another rank, may read a page before SGLang's function that stores it has returned."""
    hook = HOOKS["managers.cache_controller.HiCacheController._page_backup"]
    wrappers.apply({f"{__name__}.Backup._page_backup": hook})
    first, second = Server(tmp_path), Server(tmp_path)
    monkeypatch.setattr(hicache, "_follower", lambda: SimpleNamespace(storage=first.stored))
    first.compute(0, 1.0, [3, 4, 5, 6])
    operation = first.operation(["a"], 0)
    first.log.settle_all()
    seen: list[Any] = []
    Backup(first, lambda keys, slots: seen.append(second.load(keys)))._page_backup(operation)
    assert seen == [[(3, "1"), (4, "1"), (5, "1"), (6, "1")]]
    assert second.counters.rows_not_in_storage == 0


def test_rows_come_back_with_their_names_to_another_server(tmp_path: Path) -> None:
    first, second = Server(tmp_path), Server(tmp_path)
    first.compute(0, 1.0, [3, 4, 5, 6, 0, 1], name="older")
    first.compute(6, 7.0, [2, 3], name="newer")
    first.store(["a", "b"])
    # Numbers are those of one process.
    second.names = ["other", "newer"]
    assert second.load(["a", "b"]) == [
        *((expert, "older") for expert in (3, 4, 5, 6, 0, 1)),
        *((expert, "newer") for expert in (2, 3)),
    ]
    assert second.names == ["other", "newer", "older"]
    assert (first.counters.rows_to_storage, first.counters.rows_not_stored) == (8, 0)
    assert (second.counters.rows_from_storage, second.counters.rows_not_in_storage) == (8, 0)


def test_rows_that_are_not_valid_stay_so(tmp_path: Path) -> None:
    first = Server(tmp_path)
    first.compute(0, 1.0, [3, -1, 5, -1])
    first.store(["a"])
    second = Server(tmp_path)
    assert second.load(["a"]) == [(3, "1"), None, (5, "1"), None]
    assert (first.counters.rows_to_storage, second.counters.rows_from_storage) == (2, 2)
    assert second.counters.rows_not_in_storage == 2


def test_a_page_of_a_server_without_capture_has_invalid_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = Server(tmp_path), Server(tmp_path)
    first.controller.storage_backend.set("a", torch.ones(PAGE))
    first.controller.storage_backend.set("b", torch.ones(PAGE))
    assert second.load(["a", "b"]) == [None] * 8
    assert second.counters.rows_not_in_storage == 8
    # One of ours, and none of the storage's for each page.
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "router capture: rows of a page of HiCache's storage are, or will be, invalid: nobody has recorded the KV that"
        " was read, in this codec and layout: it is that of a server without capture, or its rows were evicted. Said"
        " once; all of them are counted."
    ]


def test_a_page_that_another_server_wrote_first_keeps_its_own_rows(tmp_path: Path) -> None:
    """Keys hash tokens only: the second server's page under other weights is skipped, and so must its rows be."""
    first, second, third = Server(tmp_path), Server(tmp_path), Server(tmp_path)
    first.compute(0, 1.0, [3, 3, 3, 3], name="older")
    first.store(["a"])
    second.compute(0, 2.0, [5, 5, 5, 5], name="newer")
    second.store(["a"])
    assert third.load(["a"]) == [(3, "older")] * 4


def test_rows_of_a_page_that_was_evicted_and_written_by_others_are_not_used(tmp_path: Path) -> None:
    first, second = Server(tmp_path), Server(tmp_path)
    first.compute(0, 1.0, [3, 3, 3, 3], name="older")
    first.store(["a"])
    (tmp_path / "a_model_0_1.bin").unlink()
    first.controller.storage_backend.set("a", torch.full((PAGE,), 2.0))
    assert second.load(["a"]) == [None] * 4
    # Whoever computes that KV and records it has rows for it, in spite of those that are there.
    first.pool.kv[:PAGE] = 2.0
    third = Server(tmp_path)
    third.compute(0, 1.0, [5, 5, 5, 5], name="newer")
    third.pool.kv[:PAGE] = 2.0
    third.store(["a"])
    assert second.load(["a"]) == [(5, "newer")] * 4


@pytest.mark.parametrize("other", [{"codec": "bitset"}, {"layout": "page_first"}])
def test_rows_of_another_codec_or_layout_are_not_used(tmp_path: Path, other: dict[str, str]) -> None:
    first, second = Server(tmp_path), Server(tmp_path, **other)
    first.compute(0, 1.0, [3, 3, 3, 3])
    first.store(["a"])
    assert second.load(["a"]) == [None] * 4
    second.compute(0, 1.0, [3, 3, 3, 3])
    second.store(["a"])
    assert second.load(["a"]) == [(3, "1")] * 4
    assert Server(tmp_path).load(["a"]) == [(3, "1")] * 4


@pytest.mark.parametrize("cut", [0, 100, None])
def test_damaged_rows_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: int | None) -> None:
    first, second = Server(tmp_path), Server(tmp_path)
    first.compute(0, 1.0, [3, 3, 3, 3, 4, 4, 4, 4])
    first.store(["a", "b"])
    files = sorted(tmp_path.glob("*.router_rows_*"))
    assert len(files) == 2
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data if cut is None else data[:cut])
    loaded = second.load(["a", "b"])
    assert sorted(loaded.count(row) for row in (None, (3, "1"), (4, "1"))) == [0, 4, 4]
    assert loaded.count(None) == 4
    assert "reading them failed" in caplog.text


def test_rows_that_were_evicted_alone_are_invalid(tmp_path: Path) -> None:
    first, second = Server(tmp_path), Server(tmp_path)
    first.compute(0, 1.0, [3, 3, 3, 3])
    first.store(["a"])
    for file in tmp_path.glob("*.router_rows_*"):
        file.unlink()
    assert second.load(["a"]) == [None] * 4


def test_the_rows_are_those_of_the_moment_when_the_page_was_chosen(tmp_path: Path) -> None:
    """The backup thread comes late: the slots have other occupants by then, in the log and in the table."""
    server = Server(tmp_path)
    server.compute(0, 1.0, [3, 3, 3, 3])
    operation = server.operation(["a"], 0)
    server.log.append(server.table.release, torch.arange(4))
    server.log.settle_all()
    server.finish(operation)
    assert server.load(["a"]) == [(3, "1")] * 4


def test_the_backup_thread_waits_for_the_pass_whose_rows_it_stores(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.compute(0, 1.0, [3, 3, 3, 3])
    # A pass in flight: what stands behind it in the log has to wait.
    record = server.log.launch(lambda slots: None, torch.zeros(1))
    operation = server.operation(["a"], 0)
    backup = threading.Thread(target=server.finish, args=(operation,))
    backup.start()
    backup.join(0.2)
    assert backup.is_alive()
    record.finalize()
    assert backup.is_alive()
    server.log.settle_all()
    backup.join(10)
    assert not backup.is_alive()
    assert server.load(["a"]) == [(3, "1")] * 4


@pytest.mark.parametrize("stopped", [True, False])
def test_no_rows_are_stored_when_the_log_does_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    server = Server(tmp_path)
    server.compute(0, 1.0, [3, 3, 3, 3])
    server.log.launch(lambda slots: None, torch.zeros(1))
    operation = server.operation(["a"], 0)
    if stopped:
        server.controller.storage_stop_event.set()
    else:
        monkeypatch.setattr(storage_module, "_WAIT_S", 0.1)
    began = time.monotonic()
    server.finish(operation)
    # SGLang waits ten seconds for its threads.
    assert time.monotonic() - began < 10
    server.controller.storage_stop_event.clear()
    assert (server.counters.rows_to_storage, server.counters.rows_not_stored) == (0, 4)
    assert server.load(["a"]) == [None] * 4


def test_threads_that_are_being_stopped_do_not_go_on(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.compute(0, 1.0, [3, 3, 3, 3])
    operation = server.operation(["a"], 0)
    server.log.settle_all()
    server.controller.storage_stop_event.set()
    server.finish(operation)
    assert server.load(["a"]) == [None] * 4
    assert server.counters.rows_not_stored == 4


def test_names_that_do_not_fit_leave_the_page_without_rows(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.compute(0, 1.0, [3, 3, 3, 3], name="n" * 2000)
    server.store(["a"])
    assert server.counters.rows_not_stored == 4
    assert server.load(["a"]) == [None] * 4


def test_a_storage_that_fails_takes_nothing_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tmp_path)
    server.compute(0, 1.0, [3, 3, 3, 3])
    server.store(["a"])

    def failing(key: str) -> bool:
        raise ConnectionError("gone")

    monkeypatch.setattr(server.controller.storage_backend, "exists", failing)
    assert server.load(["a"]) == [None] * 4
    operation = server.operation(["b"], 0)
    server.log.settle_all()
    server.stored.store(server.controller, operation)
    assert server.counters.rows_not_stored == 4


def test_rows_are_of_their_key_only() -> None:
    page = PageRows(
        torch.arange(12, dtype=torch.uint8).view(4, 3), torch.ones(4) > 0, ("é", "b"), torch.tensor([0, 1, 1, 0])
    )
    packed = page.to_bytes("key")
    assert packed is not None
    assert len(packed) == packed_size(4, 3)
    read = PageRows.from_bytes("key", packed, 4, 3)
    assert (read.names, read.named.tolist(), read.valid.tolist()) == (("é", "b"), [0, 1, 1, 0], [True] * 4)
    assert torch.equal(read.rows, page.rows)
    with pytest.raises(DataError, match="the 1064 bytes stored as other are not the rows"):
        PageRows.from_bytes("other", packed, 4, 3)
    with pytest.raises(DataError):
        PageRows.from_bytes("key", packed, 3, 3)
