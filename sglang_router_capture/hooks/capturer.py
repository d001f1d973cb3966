"""Hooks by which our recorder takes the place of SGLang's capturer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from router_replay.errors import RouterReplayError, SeamError, UnsupportedError
from router_replay.masks import RoutingGeometry, choose_codec
from sglang_router_capture import live_refusals, refusals, seam_check
from sglang_router_capture.follow.pipeline import FirstStage, LaterStage
from sglang_router_capture.hooks.process import (
    answers_wait_for_handles,
    options_of_this_process,
    other_rank_of_this_process,
    recorder_of_this_process,
)
from sglang_router_capture.hooks.registry import HOOKS, hook
from sglang_router_capture.ledger.capturer import FUSED_SHARED_EXPERTS
from sglang_router_capture.mailbox import Mailbox
from sglang_router_capture.ranks import OtherRank, Place
from sglang_router_capture.recorder import Recorder
from sglang_router_capture.server_folder import ServerFolder
from sglang_router_capture.server_store import store_of
from sglang_router_capture.staging import Staging
from sglang_router_capture.writer import Writer

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
    from sglang.srt.runtime_context import get_parallel, get_schedule, get_server_args

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
        live_refusals.require_generation(model_config)
        geometry = RoutingGeometry.from_hf_config(model_config.hf_text_config)
        place = Place.of(get_parallel())
        layers = layers_of_stage(model, geometry, place)
        live_refusals.require_reporting_routers(model, layers)
        codec = choose_codec(chosen.codec, geometry, order=chosen.needs_order)
    except RouterReplayError as error:
        refusals.stop(error)
    if place.stage == 0 and not place.answers:
        logger.info("router capture: this rank answers no request and records nothing")
        return OtherRank()
    num_shared = num_fused_shared_experts(model)
    own = _max_tokens_per_pass(get_schedule(), model_config.context_len, max_running_requests)
    max_tokens = place.max_tokens_per_pass(own)
    if place.stage > 0:
        logger.info("router capture: stage %d passes the routes of layers %s on", place.stage, layers)
        return LaterStage(Staging(geometry, max_tokens, num_shared, device, layers), geometry, num_shared)
    try:
        store = store_of(chosen)
        store.prepare()
    except RouterReplayError as error:
        refusals.stop(error)
    recorder = (Recorder if place.num_stages == 1 else FirstStage)(
        geometry,
        codec,
        options=chosen,
        store=store,
        num_slots=num_tokens,
        max_tokens_per_pass=max_tokens,
        num_fused_shared_experts=num_shared,
        device=device,
        layers=layers,
    )
    if answers_wait_for_handles(get_server_args()):
        recorder.writer = Writer(store, chosen.store, Mailbox(ServerFolder(chosen.start).handles))
    logger.info(
        "router capture is on: format %s, codec %s, store %s, %d MoE layers of %d of %d experts, %d bytes per token,"
        " %d KV slots (%.1f MB)",
        chosen.format,
        codec.name,
        chosen.store,
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
    if model_runner.is_draft_worker or isinstance(recorder, OtherRank):
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
        live_refusals.require_supported_allocator(model_runner.token_to_kv_pool_allocator)
    except RouterReplayError as error:
        refusals.stop(error)
    recorder.follow(model_runner.token_to_kv_pool_allocator)


@hook("model_executor.model_runner.ModelRunner.init_decode_cuda_graph", "AFTER")
@hook("model_executor.model_runner.ModelRunner.init_prefill_cuda_graph", "AFTER")
def after_cuda_graphs(result: Any, model_runner: Any, *args: Any, **others: Any) -> None:
    """Graphs were captured by passes of no request, whose layers report as others do."""
    capturer = recorder_of_this_process() or other_rank_of_this_process()
    if isinstance(capturer, (Recorder, LaterStage)):
        capturer.device_cache.reset()


def layers_of_stage(model: Any, geometry: RoutingGeometry, place: Place) -> tuple[int, ...]:
    """The MoE layers that a model's part on this stage of the pipeline holds.

    Raises:
        UnsupportedError: the model does not say.
    """
    if place.num_stages == 1:
        return geometry.moe_layers
    first, last = getattr(model, "start_layer", None), getattr(model, "end_layer", None)
    if first is None or last is None:
        raise UnsupportedError(
            f"{type(model).__name__} does not say which layers this stage of the pipeline holds (start_layer,"
            " end_layer): its routes cannot be attributed to layers. Start the server without --pipeline-parallel-size,"
            " or without router capture."
        )
    return tuple(layer for layer in geometry.moe_layers if first <= layer < last)


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
    if schedule.enable_dynamic_chunking:
        # A pipeline's chunks then follow their predicted time, and this is their only limit.
        prefill = max(prefill, schedule.max_prefill_tokens)
    # A mixed batch carries the running requests' tokens with a chunk.
    return prefill + max_running_requests
