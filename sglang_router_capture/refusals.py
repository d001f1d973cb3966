"""What cannot be captured is refused when the server starts, with the reason and the way out."""

from __future__ import annotations

from typing import Any, NoReturn

from router_replay.errors import UnsupportedError
from router_replay.masks import RoutingGeometry
from router_replay.upstream import Refusal, refuse
from sglang_router_capture.ledger import LEDGER

_WITHOUT_ONE = "start the server without one of the two"
_OFF = (None, "", "none", "NONE", "null")

SETTINGS = (
    Refusal(
        "pipeline parallelism",
        "arg_groups.fields.parallel.Parallel.pp_size",
        lambda value: value <= 1,
        "each stage sees only its own layers' routes",
        _WITHOUT_ONE,
        flag="--pipeline-parallel-size",
    ),
    Refusal(
        "speculative decoding",
        "arg_groups.fields.spec.Spec.speculative_algorithm",
        lambda value: value in _OFF,
        "accepted drafts move in the KV cache and their routes would stay behind",
        _WITHOUT_ONE,
        flag="--speculative-algorithm",
    ),
    Refusal(
        "prefill-decode disaggregation",
        "arg_groups.fields.disagg.Disagg.disaggregation_mode",
        lambda value: value in _OFF,
        "routes are not sent along with the KV cache",
        _WITHOUT_ONE,
        flag="--disaggregation-mode",
    ),
    Refusal(
        "attention data parallelism",
        "arg_groups.fields.parallel.Parallel.attn_dp_size",
        lambda value: value <= 1,
        "its token order is not captured",
        _WITHOUT_ONE,
        flag="attention data parallelism (--enable-dp-attention)",
        releases=">=0.5.22",
    ),
    Refusal(
        # Before 0.5.22 the size is derived once everything else is resolved.
        "attention data parallelism",
        "arg_groups.fields.parallel.Parallel.dp_size",
        lambda value: value <= 1,
        "its token order is not captured",
        _WITHOUT_ONE,
        flag="attention data parallelism (--dp-size)",
        only_with=("enable_dp_attention",),
        releases="<0.5.22",
    ),
    Refusal(
        "expert all-to-all backends",
        "arg_groups.fields.exec_.ExecMoe.moe_a2a_backend",
        lambda value: value in _OFF,
        "each rank routes a part of the batch",
        _WITHOUT_ONE,
        flag="--moe-a2a-backend",
    ),
    Refusal(
        "attention context parallelism",
        "arg_groups.fields.parallel.Parallel.attn_cp_size",
        lambda value: value <= 1,
        "ranks see parts of a prompt",
        _WITHOUT_ONE,
        flag="attention context parallelism (--attn-cp-size)",
    ),
    Refusal(
        "two-batch overlap",
        "arg_groups.fields.exec_.ExecOverlap.enable_two_batch_overlap",
        lambda value: not value,
        "both halves of a batch would write the same rows",
        _WITHOUT_ONE,
        flag="--enable-two-batch-overlap",
    ),
    Refusal(
        "PD multiplexing",
        "arg_groups.fields.disagg.Disagg.enable_pdmux",
        lambda value: not value,
        "prefill and decode run at once and would share the rows",
        _WITHOUT_ONE,
        flag="--enable-pdmux",
    ),
    Refusal(
        "hierarchical sparse attention",
        "arg_groups.fields.memory.Memory.enable_hisparse",
        lambda value: not value,
        "KV entries move without notice",
        _WITHOUT_ONE,
        flag="--enable-hisparse",
    ),
    Refusal(
        "diffusion language models",
        "arg_groups.fields.exec_.ExecDllm.dllm_algorithm",
        lambda value: value in _OFF,
        "tokens are computed more than once",
        _WITHOUT_ONE,
        flag="--dllm-algorithm",
    ),
)
"""Settings under which a row could be wrong and look right."""

WHOLE_ANSWERS = (
    Refusal(
        "incremental streams",
        "arg_groups.fields.serving.Serving.incremental_streaming_output",
        lambda value: not value,
        "SGLang would cut routing_masks from the last part of a stream, as if the list had an entry for every token",
        "start the server without that flag, or with --router-capture-format sglang",
        flag="--incremental-streaming-output",
    ),
)
"""Settings under which SGLang cuts what our own format adds to meta_info."""


def stop(error: Exception) -> NoReturn:
    """Leave this process with `error` as its message: SGLang swallows a plugin's ordinary exceptions."""
    raise SystemExit(f"router capture: {error}") from error


def require_supported_config(config: Any) -> None:
    """Refuse resolved server arguments under which a row could be wrong and look right.

    Args:
        config: what `sglang.srt.arg_groups.overrides.resolving_view` gives.

    Raises:
        UnsupportedError: naming the flag.
        SeamError: naming a setting that the installed SGLang no longer has.
    """
    refuse(LEDGER, SETTINGS, config)


def require_whole_answers(config: Any) -> None:
    """Refuse streams that send only what is new: SGLang cuts meta_info's lists as if they had an entry per token.

    Args:
        config: what `sglang.srt.arg_groups.overrides.resolving_view` gives.

    Raises:
        UnsupportedError: naming the flag.
        SeamError: the installed SGLang has no such setting.
    """
    refuse(LEDGER, WHOLE_ANSWERS, config)


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
