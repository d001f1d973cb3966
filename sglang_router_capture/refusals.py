"""What cannot be captured is refused when the server starts, with the reason and the way out."""

from __future__ import annotations

from typing import Any, NoReturn

from router_replay.errors import UnsupportedError
from router_replay.masks import RoutingGeometry


def stop(error: Exception) -> NoReturn:
    """Leave this process with `error` as its message: SGLang swallows a plugin's ordinary exceptions."""
    raise SystemExit(f"router capture: {error}") from error


def require_supported_config(config: Any) -> None:
    """Refuse resolved server arguments under which a row could be wrong and look right.

    Args:
        config: what `sglang.srt.arg_groups.overrides.resolving_view` gives.

    Raises:
        UnsupportedError: naming the flag.
    """
    refusals = (
        (config.pp_size > 1, "--pipeline-parallel-size", config.pp_size, "each stage sees only its own layers' routes"),
        (
            config.speculative_algorithm not in (None, "NONE"),
            "--speculative-algorithm",
            config.speculative_algorithm,
            "accepted drafts move in the KV cache and their routes would stay behind",
        ),
        (
            config.disaggregation_mode not in (None, "null"),
            "--disaggregation-mode",
            config.disaggregation_mode,
            "routes are not sent along with the KV cache",
        ),
        (config.attn_dp_size > 1, "attention data parallelism", config.attn_dp_size, "its token order is not captured"),
        (
            config.moe_a2a_backend not in (None, "none"),
            "--moe-a2a-backend",
            config.moe_a2a_backend,
            "each rank routes a part of the batch",
        ),
        (config.attn_cp_size > 1, "attention context parallelism", config.attn_cp_size, "ranks see parts of a prompt"),
        (
            config.enable_two_batch_overlap,
            "--enable-two-batch-overlap",
            True,
            "both halves of a batch would write the same rows",
        ),
        (config.enable_pdmux, "--enable-pdmux", True, "prefill and decode run at once and would share the rows"),
        (config.enable_hisparse, "--enable-hisparse", True, "KV entries move without notice"),
        (bool(config.dllm_algorithm), "--dllm-algorithm", config.dllm_algorithm, "tokens are computed more than once"),
    )
    for refused, flag, value, reason in refusals:
        if refused:
            raise UnsupportedError(
                f"router capture cannot run with {flag} ({value}): {reason}. Start the server without one of the two."
            )


def require_whole_answers(config: Any) -> None:
    """Refuse streams that send only what is new: SGLang cuts meta_info's lists as if they had an entry per token.

    Args:
        config: what `sglang.srt.arg_groups.overrides.resolving_view` gives.

    Raises:
        UnsupportedError: naming the flag.
    """
    if config.incremental_streaming_output:
        raise UnsupportedError(
            "router capture cannot run with --incremental-streaming-output: SGLang would cut routing_masks from"
            " the last part of a stream. Start the server without that flag, or with --router-capture-format sglang."
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


def require_reporting_routers(model: Any, geometry: RoutingGeometry) -> None:
    """Refuse a live model whose routers are not those of its configuration, or do not report their choice.

    Args:
        model: `torch.nn.Module` on the server.

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
    if found != geometry.moe_layers:
        raise UnsupportedError(
            f"the running model has routers that report in decoder layers {found}, its configuration routes in"
            f" {geometry.moe_layers}: routes of this model cannot be attributed to layers. Start the server without"
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
