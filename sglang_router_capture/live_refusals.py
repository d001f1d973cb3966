"""What settings do not tell is refused once it is there: a server's model, its KV allocator, its host pool."""

from __future__ import annotations

from typing import Any

from router_replay.errors import UnsupportedError


def require_generation(model_config: Any) -> None:
    """Refuse a model that SGLang runs as an embedding model, whatever its flags say.

    Args:
        model_config: `sglang.srt.configs.model_config.ModelConfig`.

    Raises:
        UnsupportedError: naming the architecture.
    """
    if not model_config.is_generation:
        raise UnsupportedError(
            f"{', '.join(model_config.hf_config.architectures)} generates nothing: SGLang drops what a pass recorded"
            " there, and no answer carries routes. Start the server without router capture."
        )


def require_supported_allocator(allocator: Any) -> None:
    """Refuse a KV allocator whose hand-outs are not heard.

    Raises:
        UnsupportedError: naming its class.
    """
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

    # Subclasses override the hooked methods, and composite allocators number their slots anew.
    if type(allocator) not in (TokenToKVPoolAllocator, PagedTokenToKVPoolAllocator):
        raise UnsupportedError(
            f"router capture does not know the KV allocator {type(allocator).__name__} of this model (known:"
            " TokenToKVPoolAllocator, PagedTokenToKVPoolAllocator), so it could not see slots change hands. Start the"
            " server without router capture."
        )


def require_supported_host_pool(host_pool: Any, device_pool: Any, allocator: Any) -> None:
    """Refuse a HiCache whose slots are not those of the host pool's buffer, or whose copies are not of the KV pool.

    Args:
        host_pool: the pool of the controller's KV, `sglang.srt.mem_cache.pool_host.base.HostKVCache`.
        device_pool: where its KV comes from.
        allocator: the KV allocator that the recorder follows.

    Raises:
        UnsupportedError: naming the classes.
    """
    from sglang.srt.mem_cache.pool_host.base import HostKVCache

    problem = None
    kv_pool = allocator.get_kvcache()
    if device_pool is not kv_pool:
        problem = (
            f"it copies the KV of a {type(device_pool).__name__}, which is not all of the {type(kv_pool).__name__}"
        )
    elif getattr(type(host_pool), "alloc", None) is not HostKVCache.alloc:
        problem = "it hands out its slots by a method of its own, which is not heard"
    elif host_pool.dcp_size > 1:
        problem = f"{host_pool.dcp_size} ranks share its slots (decode context parallelism)"
    elif _moves_entries(host_pool, device_pool):
        problem = "its entries move, and what names them are no slots"
    if problem is not None:
        raise UnsupportedError(
            f"router capture cannot follow the KV through HiCache's host pool {type(host_pool).__name__}: {problem}."
            " Start the server without --enable-hierarchical-cache, or without router capture."
        )


def _moves_entries(host_pool: Any, device_pool: Any) -> bool:
    from sglang.srt.mem_cache.pool_host.base import HostKVCache

    # 0.5.20 has none of these.
    prepares = getattr(type(host_pool), "prepare_transfer_indices", None)
    return (
        prepares is not getattr(HostKVCache, "prepare_transfer_indices", None)
        or getattr(host_pool, "shared_allocation_domain", None) is not None
        or getattr(device_pool, "host_transfer_translate", None) is not None
    )


def require_reporting_routers(model: Any, layers: tuple[int, ...]) -> None:
    """Refuse a live model whose routers are not those of its configuration, or do not report their choice.

    Args:
        model: `torch.nn.Module` on the server.
        layers: the decoder layers that route by its configuration, of those that this process holds.

    Raises:
        UnsupportedError: naming layers and backend.
    """
    from sglang.srt.layers.moe.hash_topk import HashTopK
    from sglang.srt.layers.moe.topk import TopK, TopKOutputFormat

    hashed = sorted({module.layer_id for module in model.modules() if isinstance(module, HashTopK)})
    if hashed:
        raise UnsupportedError(
            f"decoder layers {hashed} route by a hash of the token id: there is no choice to record. Start the server"
            " without router capture."
        )
    routers = [module for module in model.modules() if isinstance(module, TopK)]
    found = tuple(sorted({router.layer_id for router in routers if router.topk_config.allow_routed_experts_capture}))
    if found != layers:
        raise UnsupportedError(
            f"the running model has routers that report in decoder layers {found}, its configuration routes in"
            f" {layers}: routes of this model cannot be attributed to layers. Start the server without"
            " router capture."
        )
    silent = sorted(
        {
            f"{router.topk_config.output_format.name} in layer {router.layer_id}"
            for router in routers
            if router.topk_config.output_format in (TopKOutputFormat.BYPASSED, TopKOutputFormat.TRITON_KERNEL)
        }
    )
    if silent:
        raise UnsupportedError(
            f"the MoE backend of this server does not report the experts that it chooses ({', '.join(silent[:3])}):"
            " add --moe-runner-backend triton"
        )
