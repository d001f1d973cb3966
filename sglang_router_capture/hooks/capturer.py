"""Hooks by which our recorder takes the place of SGLang's capturer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from router_replay.errors import RouterReplayError, SeamError
from router_replay.masks import RoutingGeometry, choose_codec, open_store
from sglang_router_capture import refusals, seam_check
from sglang_router_capture.hooks.process import options_of_this_process
from sglang_router_capture.hooks.registry import HOOKS, hook
from sglang_router_capture.ledger.capturer import FUSED_SHARED_EXPERTS
from sglang_router_capture.recorder import Recorder

logger = logging.getLogger(__name__)


@hook("state_capturer.routed_experts.RoutedExpertsCapturer.create", "AROUND")
def around_create(
    original: Callable[..., Any],
    *,
    model: Any,
    model_config: Any,
    num_tokens: int,
    max_running_requests: int,
    device: str,
    **others: Any,
) -> Any:
    """Our recorder in the place of upstream's capturer."""
    from sglang.srt.runtime_context import get_schedule

    chosen = options_of_this_process()
    if chosen is None:
        return original(
            model=model,
            model_config=model_config,
            num_tokens=num_tokens,
            max_running_requests=max_running_requests,
            device=device,
            **others,
        )
    try:
        seam_check.require_applied(HOOKS)
        geometry = RoutingGeometry.from_hf_config(model_config.hf_text_config)
        refusals.require_reporting_routers(model, geometry)
        codec = choose_codec(chosen.codec, geometry, order=chosen.needs_order)
    except RouterReplayError as error:
        refusals.stop(error)
    recorder = Recorder(
        geometry,
        codec,
        options=chosen,
        store=open_store("inline:"),
        num_slots=num_tokens,
        max_tokens_per_pass=_max_tokens_per_pass(get_schedule(), model_config.context_len, max_running_requests),
        num_fused_shared_experts=num_fused_shared_experts(model),
        device=device,
    )
    logger.info(
        "router capture is on: format %s, codec %s, %d MoE layers of %d of %d experts, %d bytes per token, %d KV slots"
        " (%.1f MB)",
        chosen.format,
        codec.name,
        geometry.num_moe_layers,
        geometry.top_k,
        geometry.num_experts,
        codec.row_bytes(geometry),
        num_tokens,
        num_tokens * codec.row_bytes(geometry) / 1e6,
    )
    return recorder


@hook("model_executor.model_runner.ModelRunner.init_routed_experts_capturer", "AFTER")
def after_init_routed_experts_capturer(result: None, model_runner: Any, **others: Any) -> None:
    """The KV pool exists: the recorder follows its allocator."""
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    recorder = get_global_experts_capturer()
    if model_runner.is_draft_worker:
        return
    try:
        if not isinstance(recorder, Recorder):
            # Nobody holds the options then.
            if options_of_this_process() is None:
                return
            raise SeamError(
                f"expected the experts capturer of this server to be {Recorder.__name__}, found"
                f" {type(recorder).__name__}: SGLang, or another plugin, put it there after our hook"
            )
        refusals.require_supported_allocator(model_runner.token_to_kv_pool_allocator)
    except RouterReplayError as error:
        refusals.stop(error)
    recorder.follow(model_runner.token_to_kv_pool_allocator)


def num_fused_shared_experts(model: Any) -> int:
    """Columns of shared experts that follow the routed ones in a model's choices, by SGLang's own reading."""
    decision = seam_check.path_here(FUSED_SHARED_EXPERTS)
    if decision is not None and decision.endswith("resolve_shared_experts_config"):
        return model.shared_experts_config.num_fused_shared_experts
    # Models that can fuse none have no such attribute.
    return getattr(model, "num_fused_shared_experts", 0)


def _max_tokens_per_pass(schedule: Any, context_len: int, max_running_requests: int) -> int:
    chunk = schedule.chunked_prefill_size
    # Without chunks a pass takes prompts until the budget is used up, so the last of them may overshoot it.
    prefill = chunk if chunk is not None and chunk > 0 else schedule.max_prefill_tokens + context_len
    # A mixed batch carries the running requests' tokens with a chunk.
    return prefill + max_running_requests
