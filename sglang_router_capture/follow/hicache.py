"""HiCache's copies: rows go to host slots and back with the KV."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor

from sglang_router_capture.follow.counters import HiCacheCounters
from sglang_router_capture.follow.storage import StoredRows
from sglang_router_capture.log import Log
from sglang_router_capture.slot_table import SlotTable


class HiCacheFollower:
    """The rows of one host pool, whose slots are filled from one KV pool on the device, and from storage.

    SGLang submits a copy once the passes that wrote its source are launched, and before any that reads its target: a
    copy of rows that stands in the log at that moment is in its right place. A host slot's new occupant is announced by
    the pool's `alloc`, as on the device.

    Attributes:
        table: rows of the host slots.
        counters: what moved.
        storage: what carries rows to and from the storage behind the host pool; None where there is none, or one that
            cannot carry them.
    """

    def __init__(self, log: Log, device_table: SlotTable, device_pool: Any, host_pool: Any) -> None:
        self.table = SlotTable(host_pool.logical_size, device_table.rows.shape[1])
        self.counters = HiCacheCounters()
        self.storage: StoredRows | None = None
        self._log = log
        self._device_table = device_table
        self._device_pool = device_pool
        self._host_pool = host_pool

    def slots_allocated(self, host_pool: Any, slots: Tensor | None) -> None:
        """A host pool handed out slots `int64 [m]` (None: it had too few)."""
        if host_pool is self._host_pool and slots is not None and slots.numel():
            self._log.append(self.table.release, slots)

    def copied_to_host(self, transfers: Iterable[Any]) -> None:
        """KV is on its way to the host, by `sglang.srt.mem_cache.l2_transfer.L2Transfer`s."""
        for transfer in self._ours(transfers):
            copy = partial(self.table.copy_from, self._device_table)
            self._log.append(copy, transfer.device_indices, transfer.host_indices)
            self.counters.rows_to_host += len(transfer.host_indices)

    def copied_to_device(self, transfers: Iterable[Any]) -> None:
        """KV is on its way to the device, by `sglang.srt.mem_cache.l2_transfer.L2Transfer`s."""
        for transfer in self._ours(transfers):
            copy = partial(self._device_table.copy_from, self.table)
            self._log.append(copy, transfer.host_indices, transfer.device_indices)
            self.counters.rows_from_host += len(transfer.host_indices)

    def _ours(self, transfers: Iterable[Any]) -> list[Any]:
        # Side pools and drafts have transfers of their own over the same slots.
        return [
            transfer
            for transfer in transfers
            if transfer.host_pool is self._host_pool
            and transfer.device_pool is self._device_pool
            and not transfer.is_draft
            and transfer.host_indices.numel()
        ]
