"""The hooks, by the seam that each stands on. SGLang's `HookRegistry` gives their calling conventions."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import Any

from router_replay.errors import RouterReplayError, SeamError
from router_replay.masks import RoutingGeometry, choose_codec, open_store
from sglang_router_capture import answer, options, refusals, seam_check
from sglang_router_capture.ledger import FUSED_SHARED_EXPERTS
from sglang_router_capture.options import CaptureOptions
from sglang_router_capture.recorder import Recorder

logger = logging.getLogger(__name__)


def after_add_cli_args(result: None, parser: argparse.ArgumentParser, **others: Any) -> None:
    """Our flags join the server's."""
    options.add_arguments(parser)


def after_from_cli_args(result: Any, cls: type, args: argparse.Namespace, **others: Any) -> None:
    """The command line is parsed: hand our part of it to this process and its children."""
    try:
        chosen = options.from_arguments(args)
    except RouterReplayError as error:
        refusals.stop(error)
    if chosen is not None:
        chosen.export()


def around_resolve_once(original: Callable[..., None], server_args: Any, **others: Any) -> None:
    """Ask SGLang for routes, which keeps fused routers out of its choice of kernels; then refuse what cannot be."""
    from sglang.srt.arg_groups.overrides import resolving_view

    chosen = _options_of_this_process()
    if chosen is None:
        return original(server_args, **others)
    # Upstream sets the attribute when it is done, and reads it in the same way.
    if not getattr(server_args, "_resolution_finished", False):
        server_args.enable_return_routed_experts = True
    original(server_args, **others)
    try:
        seam_check.require_applied(HOOKS)
        refusals.require_supported_config(resolving_view(server_args))
        if chosen.format == "masks":
            refusals.require_whole_answers(resolving_view(server_args))
    except RouterReplayError as error:
        refusals.stop(error)


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

    chosen = _options_of_this_process()
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


def after_init_routed_experts_capturer(result: None, model_runner: Any, **others: Any) -> None:
    """The KV pool exists: the recorder follows its allocator."""
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    recorder = get_global_experts_capturer()
    if model_runner.is_draft_worker:
        return
    try:
        if not isinstance(recorder, Recorder):
            # Nobody holds the options then.
            if _options_of_this_process() is None:
                return
            raise SeamError(
                f"expected the experts capturer of this server to be {Recorder.__name__}, found"
                f" {type(recorder).__name__}: SGLang, or another plugin, put it there after our hook"
            )
        refusals.require_supported_allocator(model_runner.token_to_kv_pool_allocator)
    except RouterReplayError as error:
        refusals.stop(error)
    recorder.follow(model_runner.token_to_kv_pool_allocator)


def after_alloc(slots: Any, allocator: Any, *args: Any, **kwargs: Any) -> None:
    """A KV allocator handed out slots, whichever of its methods was called."""
    if recorder := _recorder():
        recorder.slots_allocated(allocator, slots)


def around_collect(original: Callable[..., None], processor: Any, req: Any, **others: Any) -> None:
    """A request that asked for its routes is done and still holds its KV slots."""
    recorder = _recorder()
    if recorder is None or recorder.options.format == "sglang":
        return original(processor, req, **others)
    if req.return_routed_experts:
        answer.collect(recorder, req, processor.req_to_token_pool)


def before_release_req(*, req: Any, req_to_token_pool: Any, **others: Any) -> None:
    """A running request is retracted, and its KV is about to go."""
    recorder = _recorder()
    # Upstream's format has upstream's meaning: what the prefill after the retraction computed.
    if recorder is None or recorder.options.format == "sglang":
        return
    if req.return_routed_experts:
        answer.keep(recorder, req, req_to_token_pool)


def after_get_output_streamer_class(streamer_class: Any, scheduler: Any, **others: Any) -> type | None:
    """A streamer that adds each finished request's handle to its meta_info."""
    recorder = _recorder()
    if recorder is None and _options_of_this_process() is not None:
        refusals.stop(
            SeamError(
                "the scheduler asked for its output streamer before it had a recorder, so that answers would lack their"
                " masks without a word: expected the experts capturer of this server to be made first"
            )
        )
    if recorder is None or recorder.options.format == "sglang":
        return None
    inherited = streamer_class.build_additional_customized_info

    class RoutingMasksStreamer(streamer_class):
        """SGLang's output streamer, with `meta_info["routing_masks"]`: a list that holds the request's handle."""

        __slots__ = ()
        has_additional_customized_info = True

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list]:
            info = inherited(self, reqs)
            found = [answer.handles(req) for req in reqs]
            return {**info, answer.META_INFO_KEY: found} if any(found) else info

    return RoutingMasksStreamer


def num_fused_shared_experts(model: Any) -> int:
    """Columns of shared experts that follow the routed ones in a model's choices, by SGLang's own reading."""
    decision = seam_check.path_here(FUSED_SHARED_EXPERTS)
    if decision is not None and decision.endswith("resolve_shared_experts_config"):
        return model.shared_experts_config.num_fused_shared_experts
    # Models that can fuse none have no such attribute.
    return getattr(model, "num_fused_shared_experts", 0)


def _recorder() -> Recorder | None:
    """The recorder of this process, which holds its options; None where capture is off."""
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    recorder = get_global_experts_capturer()
    return recorder if isinstance(recorder, Recorder) else None


def _options_of_this_process() -> CaptureOptions | None:
    """What the environment says, for the hooks that run before there is a recorder."""
    try:
        return CaptureOptions.from_environment()
    except RouterReplayError as error:
        refusals.stop(error)


def _max_tokens_per_pass(schedule: Any, context_len: int, max_running_requests: int) -> int:
    chunk = schedule.chunked_prefill_size
    # Without chunks a pass takes prompts until the budget is used up, so the last of them may overshoot it.
    prefill = chunk if chunk is not None and chunk > 0 else schedule.max_prefill_tokens + context_len
    # A mixed batch carries the running requests' tokens with a chunk.
    return prefill + max_running_requests


_PROCESSOR = "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"

HOOKS: dict[str, tuple[Callable[..., Any], str]] = {
    "server_args.ServerArgs.add_cli_args": (after_add_cli_args, "AFTER"),
    "server_args.ServerArgs.from_cli_args": (after_from_cli_args, "AFTER"),
    "server_args.ServerArgs.resolve_once": (around_resolve_once, "AROUND"),
    "state_capturer.routed_experts.RoutedExpertsCapturer.create": (around_create, "AROUND"),
    "model_executor.model_runner.ModelRunner.init_routed_experts_capturer": (
        after_init_routed_experts_capturer,
        "AFTER",
    ),
    "mem_cache.allocator.token.TokenToKVPoolAllocator.alloc": (after_alloc, "AFTER"),
    "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc": (after_alloc, "AFTER"),
    "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_extend": (after_alloc, "AFTER"),
    "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_decode": (after_alloc, "AFTER"),
    f"{_PROCESSOR}._maybe_collect_routed_experts": (around_collect, "AROUND"),
    "managers.schedule_batch.release_req": (before_release_req, "BEFORE"),
    "managers.scheduler.Scheduler.get_output_streamer_class": (after_get_output_streamer_class, "AFTER"),
}
