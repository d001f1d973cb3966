"""HiCache's storage: rows lie beside the pages, and come back with them after a restart.

SGLang names a page by a hash of its tokens: not of the weights that computed it, nor of the server that wrote it. The
page under a name may be another server's, may have been evicted and computed anew, and it is another file than its
rows. Therefore the rows' key holds a digest of the page's KV bytes. Rows are stored under the digest of the bytes that
they were recorded with, and looked for under that of the bytes that were read: whoever wrote which of the two files,
and when, rows are found only for KV that is bit for bit what their own pass produced. A page whose KV was recorded by
nobody has none, and its tokens' rows stay invalid.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from router_replay.masks import Codec, RoutingGeometry
from sglang_router_capture.follow.counters import HiCacheCounters
from sglang_router_capture.follow.page_rows import FORMAT, PageRows, packed_size
from sglang_router_capture.log import Log
from sglang_router_capture.slot_table import SlotTable

logger = logging.getLogger(__name__)

CARRYING_BACKENDS = ("file",)
"""Storage backends whose `get` and `set` take bytes of any size, as rows are."""

_SNAPSHOT = "_router_capture_rows"
_WAIT_S = 60.0


class StoredRows:
    """The rows that go to and come from the storage behind one host pool.

    SGLang's storage threads call `store` and `load`; neither touches the table. What goes out is copied in the log's
    turn (`snapshot`), and what comes in is written in it.

    Args:
        log: of the table.
        table: rows of the host slots.
        version_name: name of a weight version by its number; called on the scheduler thread.
        version_number: the reverse, a number for names that this process has not met; called likewise.
    """

    def __init__(
        self,
        log: Log,
        table: SlotTable,
        geometry: RoutingGeometry,
        codec: Codec,
        *,
        version_name: Callable[[int], str],
        version_number: Callable[[str], int],
        counters: HiCacheCounters,
    ) -> None:
        self._log = log
        self._table = table
        self._rows_are = f"{FORMAT} {codec.name} {geometry}"
        self._version_name = version_name
        self._version_number = version_number
        self._counters = counters
        self._told: set[str] = set()

    def snapshot(self, operation: Any, host_slots: Tensor) -> None:
        """An operation that will store the pages in `host_slots int64 [n]` was made: keep their rows as they are now.

        Args:
            operation: `sglang.srt.managers.cache_controller.StorageOperation`, not handed to its thread yet.
        """
        snapshot = _Snapshot(self._table, self._version_name)
        self._log.append(snapshot.take, host_slots)
        setattr(operation, _SNAPSHOT, snapshot)
        # Where nothing is in flight nobody has to wait: a stage of a pipeline may wait for its storage before it
        # launches the next pass.
        self._log.settle_what_is_ready()

    def store(self, controller: Any, operation: Any) -> None:
        """Store the rows of an operation's pages, which are to be stored next. On SGLang's backup thread.

        The rows first: another server, or another rank, may read a page as soon as it is there. Rows whose page is then
        not stored are found by nobody.

        Args:
            controller: `sglang.srt.managers.cache_controller.HiCacheController`.
            operation: what was made when `snapshot` was called.
        """
        snapshot: _Snapshot | None = getattr(operation, _SNAPSHOT, None)
        page_size = controller.page_size
        num_pages = len(operation.hash_value)
        if snapshot is None or not num_pages:
            return
        delattr(operation, _SNAPSHOT)
        if not snapshot.taken_in_time(controller.storage_stop_event):
            self._counters.rows_not_stored += num_pages * page_size
            self._tell_once("too late", "no pass ended in time after they were to be kept, or HiCache was reset")
            return
        for number, page_key in enumerate(operation.hash_value[:num_pages]):
            span = slice(number * page_size, (number + 1) * page_size)
            page = snapshot.page(span)
            num_valid = int(page.valid.sum())
            if num_valid == 0:
                continue
            if self._store_page(controller, page_key, operation.host_indices[span], page):
                self._counters.rows_to_storage += num_valid
            else:
                self._counters.rows_not_stored += num_valid

    def load(self, controller: Any, page_keys: Sequence[str], host_slots: Tensor) -> None:
        """Pages were read into `host_slots int64 [n]`: find their rows. On SGLang's thread, before it says so.

        Args:
            controller: `sglang.srt.managers.cache_controller.HiCacheController`.
            page_keys: SGLang's, one for each page.
        """
        page_size = controller.page_size
        found: list[tuple[Tensor, PageRows]] = []
        for page_key, slots in zip(page_keys, host_slots.split(page_size), strict=True):
            page = self._load_page(controller, page_key, slots)
            num_valid = 0 if page is None else int(page.valid.sum())
            self._counters.rows_from_storage += num_valid
            self._counters.rows_not_in_storage += page_size - num_valid
            if page is not None:
                found.append((slots, page))
        if not found:
            return
        names = tuple(dict.fromkeys(name for _, page in found for name in page.names))
        numbering = [torch.tensor([names.index(name) for name in page.names])[page.named.long()] for _, page in found]
        self._log.append(
            partial(self._loaded, names),
            torch.cat([slots for slots, _ in found]),
            torch.cat([page.rows for _, page in found]),
            torch.cat([page.valid for _, page in found]),
            torch.cat(numbering),
        )

    def _loaded(self, names: tuple[str, ...], slots: Tensor, rows: Tensor, valid: Tensor, named: Tensor) -> None:
        # Rows that are not valid have no name.
        numbers = torch.tensor([self._version_number(name) if name else -1 for name in names], dtype=torch.int32)
        self._table.write(slots, rows, valid, numbers[named])

    def _store_page(self, controller: Any, page_key: str, slots: Tensor, page: PageRows) -> bool:
        # SGLang waits for its threads to stop, and not for long.
        if controller.storage_stop_event.is_set():
            return False
        try:
            key = self._key(controller, page_key, slots)
            packed = page.to_bytes(key)
            if packed is None:
                self._tell_once("names", f"the names of their weights are too long ({str(page.names)[:80]} ...)")
                return False
            if controller.storage_backend.set(key, packed):
                return True
            self._tell_once("not taken", "the storage did not take them, and its own log says why")
        except Exception as error:
            # A storage may raise anything, and the page is stored all the same.
            self._tell_once("not written", f"storing them failed ({error!r})")
        return False

    def _load_page(self, controller: Any, page_key: str, slots: Tensor) -> PageRows | None:
        if controller.storage_stop_event.is_set():
            return None
        backend = controller.storage_backend
        row_bytes = self._table.rows.shape[1]
        try:
            key = self._key(controller, page_key, slots)
            target = torch.empty(packed_size(len(slots), row_bytes), dtype=torch.uint8)
            # Asked first, since `get` writes a warning for every key that is not there.
            if backend.exists(key) and backend.get(key, target) is not None:
                return PageRows.from_bytes(key, target, len(slots), row_bytes)
            self._tell_once(
                "not there",
                "nobody has recorded the KV that was read, in this codec and layout: it is that of a server without"
                " capture, or its rows were evicted",
            )
        except Exception as error:
            # A storage may raise anything, and the page was read all the same.
            self._tell_once("not read", f"reading them failed ({error!r})")
        return None

    def _key(self, controller: Any, page_key: str, slots: Tensor) -> str:
        pool = controller.storage_host_pool
        kv = pool.get_data_page(int(slots[0])).contiguous().view(torch.uint8).numpy()
        # The file says nothing of its layout, and in another one the same bytes are another KV.
        layout = f"{pool.layout} {pool.dtype} {controller.page_size}"
        named = f"{self._rows_are} {layout} {page_key} {hashlib.sha256(kv).hexdigest()}"
        return hashlib.sha256(named.encode()).hexdigest()[:32] + ".router_rows"

    def _tell_once(self, kind: str, why: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            logger.warning(
                "router capture: rows of a page of HiCache's storage are, or will be, invalid: %s. Said once; all of"
                " them are counted.",
                why,
            )


class _Snapshot:
    """Rows of host slots at one moment of the log."""

    def __init__(self, table: SlotTable, version_name: Callable[[int], str]) -> None:
        self._table = table
        self._version_name = version_name
        self._taken = threading.Event()

    def take(self, slots: Tensor) -> None:
        """Copy the rows of `slots int64 [n]`. The log calls it."""
        self._rows, self._valid, versions = self._table.read(slots)
        # What is not valid was computed by no weights.
        numbers, self._named = torch.where(self._valid, versions, -1).unique(return_inverse=True)
        self._names = [self._version_name(number) if number >= 0 else "" for number in numbers.tolist()]
        self._taken.set()

    def taken_in_time(self, stopping: threading.Event) -> bool:
        """Wait for `take`, which may have to wait for a pass; not while the threads are being stopped."""
        deadline = time.monotonic() + _WAIT_S
        while not self._taken.wait(0.05):
            if stopping.is_set() or time.monotonic() > deadline:
                return False
        return True

    def page(self, span: slice) -> PageRows:
        """The rows of one page."""
        numbers, named = self._named[span].unique(return_inverse=True)
        names = tuple(self._names[number] for number in numbers.tolist())
        return PageRows(self._rows[span], self._valid[span], names, named)
