"""Hooks on HiCache: when its host pool is there, on its copies, and on the pages that go to storage and come back."""

from __future__ import annotations

import logging
from typing import Any

from router_replay.errors import RouterReplayError
from sglang_router_capture import live_refusals, refusals
from sglang_router_capture.follow.hicache import HiCacheFollower
from sglang_router_capture.follow.storage import CARRYING_BACKENDS, StoredRows
from sglang_router_capture.hooks.process import recorder_of_this_process
from sglang_router_capture.hooks.registry import hook
from sglang_router_capture.recorder import Recorder

logger = logging.getLogger(__name__)

_CONTROLLER = "managers.cache_controller.HiCacheController"
_ENGINE = "mem_cache.l2_transfer.L2TransferEngine"


@hook(f"{_CONTROLLER}.__init__", "AFTER")
def after_controller_init(result: None, controller: Any, *args: Any, **kwargs: Any) -> None:
    """HiCache is there: rows follow the KV of the allocator that the recorder follows."""
    recorder = recorder_of_this_process()
    if recorder is None or not recorder.follows(controller.mem_pool_device_allocator):
        return
    # A group of pools has one whose indices are those of the KV.
    entry = getattr(controller.mem_pool_host, "anchor_entry", None)
    host_pool = controller.mem_pool_host if entry is None else entry.host_pool
    device_pool = controller.mem_pool_device if entry is None else entry.device_pool
    try:
        live_refusals.require_supported_host_pool(host_pool, device_pool, controller.mem_pool_device_allocator)
    except RouterReplayError as error:
        refusals.stop(error)
    recorder.hicache = HiCacheFollower(recorder.log, recorder.table, device_pool, host_pool)
    num_slots, row_bytes = recorder.hicache.table.rows.shape
    logger.info(
        "router capture: rows follow the KV through HiCache, %d host slots (%.1f MB)",
        num_slots,
        num_slots * row_bytes / 1e6,
    )
    if controller.storage_backend_type is not None:
        _attach_storage(recorder, recorder.hicache, controller)


@hook(f"{_CONTROLLER}.attach_storage_backend", "AFTER")
def after_attach_storage_backend(result: None, controller: Any, **others: Any) -> None:
    """A storage is attached, at the start or later."""
    recorder = recorder_of_this_process()
    if recorder is not None and recorder.hicache is not None:
        _attach_storage(recorder, recorder.hicache, controller)


@hook("mem_cache.pool_host.base.HostKVCache.alloc", "AFTER")
def after_host_alloc(slots: Any, host_pool: Any, *args: Any, **kwargs: Any) -> None:
    """A host pool handed out slots."""
    if follower := _follower():
        follower.slots_allocated(host_pool, slots)


@hook(f"{_ENGINE}.submit_device_to_host", "AFTER")
def after_submit_device_to_host(completion: Any, engine: Any, transfers: Any, **others: Any) -> None:
    """KV is copied to the host."""
    if follower := _follower():
        follower.copied_to_host(transfers)


@hook(f"{_ENGINE}.submit_host_to_device", "AFTER")
def after_submit_host_to_device(completion: Any, engine: Any, transfers: Any, **others: Any) -> None:
    """KV is copied back to the device."""
    if follower := _follower():
        follower.copied_to_device(transfers)


@hook("managers.cache_controller.StorageOperation.__init__", "AFTER")
def after_storage_operation_init(result: None, operation: Any, host_indices: Any, *args: Any, **kwargs: Any) -> None:
    """Pages are about to be stored; an operation that reads pages has no slots yet."""
    follower = _follower()
    if follower is not None and follower.storage is not None and host_indices is not None:
        follower.storage.snapshot(operation, host_indices)


@hook(f"{_CONTROLLER}._page_backup", "BEFORE")
def before_page_backup(controller: Any, operation: Any, **others: Any) -> None:
    """Pages are about to be stored, on SGLang's backup thread."""
    follower = _follower()
    if follower is not None and follower.storage is not None:
        follower.storage.store(controller, operation)


@hook(f"{_CONTROLLER}._page_transfer_kv_batch", "AFTER")
def after_page_transfer_kv_batch(
    num_pages: int,
    controller: Any,
    operation: Any,
    batch_hashes: Any,
    batch_host_indices: Any,
    *args: Any,
    **kwargs: Any,
) -> None:
    """The first `num_pages` of these pages were read, on SGLang's thread."""
    follower = _follower()
    if follower is not None and follower.storage is not None and num_pages:
        slots = batch_host_indices[: num_pages * controller.page_size]
        follower.storage.load(controller, batch_hashes[:num_pages], slots)


def _follower() -> HiCacheFollower | None:
    recorder = recorder_of_this_process()
    return None if recorder is None else recorder.hicache


def _attach_storage(recorder: Recorder, follower: HiCacheFollower, controller: Any) -> None:
    follower.storage = None
    if controller.storage_backend_type not in CARRYING_BACKENDS:
        logger.warning(
            "router capture: HiCache's storage %r cannot carry rows (known: %s). Rows of tokens whose KV comes from it"
            " are marked invalid.",
            controller.storage_backend_type,
            ", ".join(CARRYING_BACKENDS),
        )
        return
    config = controller.storage_config
    if config.tp_size * config.pp_size > 1:
        # Each rank stores its own part of a page, and what vouches for the rows is the KV of one.
        logger.warning(
            "router capture: several ranks hold parts of a page of HiCache's storage (%d of tensor, %d of pipeline"
            " parallelism), and its rows do not go there. Rows of tokens whose KV comes from it are marked invalid.",
            config.tp_size,
            config.pp_size,
        )
        return
    follower.storage = StoredRows(
        recorder.log,
        follower.table,
        recorder.geometry,
        recorder.codec,
        version_name=recorder.weight_versions.name,
        version_number=recorder.weight_versions.number,
        counters=follower.counters,
    )
