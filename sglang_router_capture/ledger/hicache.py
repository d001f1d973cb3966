"""The ledger's rows of HiCache: its host pool, its copies, and the storage behind it."""

from __future__ import annotations

from router_replay.upstream import At, Attribute, Seam

_FOLLOWED = "SGLang's HiCache carries bytes of plugins with each token's KV"
_STABLE = "never: this is the interface of HiCache's storages"
_CONTROLLER = "managers.cache_controller.HiCacheController"
_OPERATION = "managers.cache_controller.StorageOperation"
_ENGINE = "mem_cache.l2_transfer.L2TransferEngine"
_TRANSFER = "mem_cache.l2_transfer.L2Transfer"
_HOST_POOL = "mem_cache.pool_host.base.HostKVCache"
_FILE = "mem_cache.hicache_storage.HiCacheFile"
_GROUP = "mem_cache.pool_host.group"
_HOST_TEST = "tests/sglang_router_capture/test_hicache.py::test_rows_follow_the_kv_to_the_host_and_back"
_STORAGE_TEST = "tests/sglang_router_capture/test_hicache.py::test_rows_outlive_their_server_beside_the_pages"
_REFUSAL_TEST = "tests/sglang_router_capture/test_follow_hicache.py::test_pools_that_cannot_be_followed_are_refused"

SEAMS = (
    Seam(
        f"{_CONTROLLER}.__init__",
        (),
        "hooked by hooks.hicache.after_controller_init",
        "the table of the host's rows needs to know the host pool",
        _FOLLOWED,
    ),
    Seam(
        f"{_CONTROLLER}.attach_storage_backend",
        (),
        "hooked by hooks.hicache.after_attach_storage_backend",
        "a storage may be attached at any time, and not each of them carries rows",
        _FOLLOWED,
    ),
    Seam(
        f"{_CONTROLLER}._page_backup",
        ("operation",),
        "hooked by hooks.hicache.before_page_backup",
        "rows are stored where their page will be, and before anybody sees it",
        _FOLLOWED,
    ),
    Seam(
        f"{_CONTROLLER}._page_transfer_kv_batch",
        ("operation", "batch_hashes", "batch_host_indices"),
        "hooked by hooks.hicache.after_page_transfer_kv_batch",
        "rows are read where their page is, and before anybody sees that",
        _FOLLOWED,
    ),
    Seam(
        f"{_OPERATION}.__init__",
        ("host_indices",),
        "hooked by hooks.hicache.after_storage_operation_init",
        "the rows that are stored must be those of the moment when SGLang decides to store their page",
        _FOLLOWED,
    ),
    Seam(
        f"{_HOST_POOL}.alloc",
        (),
        "hooked by hooks.hicache.after_host_alloc",
        "a host slot that is handed out has a new occupant",
        _FOLLOWED,
    ),
    Seam(
        f"{_ENGINE}.submit_device_to_host",
        ("transfers",),
        "hooked by hooks.hicache.after_submit_device_to_host",
        "rows follow the KV that is copied to the host",
        _FOLLOWED,
    ),
    Seam(
        f"{_ENGINE}.submit_host_to_device",
        ("transfers",),
        "hooked by hooks.hicache.after_submit_host_to_device",
        "rows follow the KV that is copied back",
        _FOLLOWED,
    ),
    *(
        Seam(
            f"{_TRANSFER}.{name}",
            None,
            "read by follow.hicache.HiCacheFollower",
            f"it tells {what} of a copy",
            _FOLLOWED,
        )
        for name, what in (
            ("host_pool", "the host's side"),
            ("device_pool", "the device's side"),
            ("host_indices", "the host's slots"),
            ("device_indices", "the device's slots"),
            ("is_draft", "the draft model's side"),
        )
    ),
    Seam(
        _HOST_POOL,
        None,
        "read by live_refusals.require_supported_host_pool",
        "only host pools whose hand-outs are heard can be followed",
        _FOLLOWED,
    ),
    Seam(
        f"{_HOST_POOL}.logical_size",
        None,
        "read by follow.hicache.HiCacheFollower",
        "the table holds a row for each host slot",
        _FOLLOWED,
    ),
    Seam(
        (At(f"{_HOST_POOL}.prepare_transfer_indices", ">=0.5.21"),),
        None,
        "read by live_refusals.require_supported_host_pool",
        "a pool with a method of its own names its entries by something else than slots",
        _FOLLOWED,
    ),
    Seam(
        (At(f"{_HOST_POOL}.shared_allocation_domain", ">=0.5.21"),),
        None,
        "read by live_refusals.require_supported_host_pool",
        "a pool that has such a domain may move its entries without notice",
        _FOLLOWED,
    ),
    Seam(
        f"{_HOST_POOL}.dcp_size",
        None,
        "read by live_refusals.require_supported_host_pool",
        "ranks that share a slot have parts of its tokens",
        _FOLLOWED,
    ),
    Seam(
        f"{_HOST_POOL}.get_data_page",
        ("index",),
        "called by follow.storage.StoredRows",
        "rows belong to the bytes of their page",
        _FOLLOWED,
    ),
    Seam(
        "mem_cache.allocator.base.BaseTokenToKVPoolAllocator.get_kvcache",
        (),
        "called by live_refusals.require_supported_host_pool",
        "HiCache must copy the KV whose slots the recorder follows",
        _FOLLOWED,
    ),
    Seam(
        f"{_FILE}.exists",
        ("key",),
        "called by follow.storage.StoredRows",
        "a page may be there without its rows",
        _STABLE,
    ),
    Seam(
        "mem_cache.hicache_storage.HiCacheStorageConfig.tp_size",
        None,
        "read by hooks.hicache.after_controller_init",
        "each rank of a stage has a part of a page",
        _STABLE,
    ),
    Seam(
        "mem_cache.hicache_storage.HiCacheStorageConfig.pp_size",
        None,
        "read by hooks.hicache.after_controller_init",
        "each stage has a part of a page",
        _STABLE,
    ),
    Seam(
        f"{_FILE}.get",
        ("key", "target_location"),
        "called by follow.storage.StoredRows",
        "rows are read beside their page",
        _STABLE,
    ),
    Seam(
        f"{_FILE}.set",
        ("key", "value"),
        "called by follow.storage.StoredRows",
        "rows are stored beside their page",
        _STABLE,
    ),
)

ATTRIBUTES = (
    *(
        Attribute(_CONTROLLER, name, f"read by {reader}", why, test)
        for name, reader, why, test in (
            (
                "mem_pool_device_allocator",
                "hooks.hicache.after_controller_init",
                "it tells whose KV is copied",
                _HOST_TEST,
            ),
            ("mem_pool_host", "hooks.hicache.after_controller_init", "it is, or holds, the host pool", _HOST_TEST),
            ("mem_pool_device", "hooks.hicache.after_controller_init", "it is where the KV comes from", _REFUSAL_TEST),
            ("storage_backend_type", "hooks.hicache.after_controller_init", "it names the storage", _STORAGE_TEST),
            ("storage_config", "hooks.hicache.after_controller_init", "it tells who holds a page", _STORAGE_TEST),
            ("storage_backend", "follow.storage.StoredRows", "it keeps the rows", _STORAGE_TEST),
            ("storage_host_pool", "follow.storage.StoredRows", "it holds the bytes of a page", _STORAGE_TEST),
            ("storage_stop_event", "follow.storage.StoredRows", "it tells threads to stop waiting", _STORAGE_TEST),
            ("page_size", "follow.storage.StoredRows", "it is how many tokens a page holds", _STORAGE_TEST),
        )
    ),
    *(
        Attribute(_OPERATION, name, "read by follow.storage.StoredRows.store", why, _STORAGE_TEST)
        for name, why in (
            ("completed_tokens", "only what was stored has rows that can be stored"),
            ("hash_value", "it holds the keys of the pages"),
            ("host_indices", "it holds the slots of the pages"),
        )
    ),
    Attribute(
        f"{_GROUP}.HostPoolGroup",
        "anchor_entry",
        "read by hooks.hicache.after_controller_init",
        "of several host pools it is the one with the KV",
        _HOST_TEST,
    ),
    Attribute(
        f"{_GROUP}.PoolEntry",
        "host_pool",
        "read by hooks.hicache.after_controller_init",
        "it is the pool whose slots have rows",
        _HOST_TEST,
    ),
    Attribute(
        f"{_GROUP}.PoolEntry",
        "device_pool",
        "read by hooks.hicache.after_controller_init",
        "it is the pool whose KV comes to the host",
        _HOST_TEST,
    ),
    Attribute(
        _HOST_POOL,
        "layout",
        "read by follow.storage.StoredRows",
        "the same bytes are another KV in another layout",
        _STORAGE_TEST,
    ),
    Attribute(
        _HOST_POOL,
        "dtype",
        "read by follow.storage.StoredRows",
        "the same bytes are another KV in another type",
        _STORAGE_TEST,
    ),
    Attribute(
        None,
        "host_transfer_translate",
        "read by live_refusals.require_supported_host_pool",
        "a pool that translates slots has entries that move",
        _REFUSAL_TEST,
        releases=">=0.5.21",
    ),
)
