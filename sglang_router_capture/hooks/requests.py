"""Hooks on a request: when it is retracted, when it is done, and on its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from router_replay.errors import SeamError
from sglang_router_capture import answer, refusals
from sglang_router_capture.hooks.process import (
    options_of_this_process,
    other_rank_of_this_process,
    recorder_of_this_process,
)
from sglang_router_capture.hooks.registry import hook

_PROCESSOR = "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"


@hook(f"{_PROCESSOR}._maybe_collect_routed_experts", "AROUND")
def around_collect(original: Callable[..., None], processor: Any, req: Any, **others: Any) -> None:
    """A request that asked for its routes is done and still holds its KV slots."""
    recorder = recorder_of_this_process()
    if recorder is None:
        return original(processor, req, **others)
    if not req.return_routed_experts or _only_fills_the_cache(req):
        return
    if recorder.options.format == "masks":
        answer.collect(recorder, req, processor.req_to_token_pool)
    else:
        # Upstream would do the same, and take what is packed for rows that are missing.
        num_tokens = len(req.origin_input_ids) + len(req.output_ids_through_stop)
        req.routed_experts = recorder.get_topk(
            req.kv.req_pool_idx, num_tokens, processor.req_to_token_pool, req.routed_experts_start_len
        )


def _only_fills_the_cache(req: Any) -> bool:
    """Whether this is the copy of a prompt by which SGLang fills the prefix cache for several choices.

    Nobody reads its answer.
    """
    return req.sampling_params.max_new_tokens == 0 and req.sampling_params.n > 1


@hook("managers.schedule_batch.release_req", "BEFORE")
def before_release_req(*, req: Any, req_to_token_pool: Any, **others: Any) -> None:
    """A running request is retracted, and its KV is about to go."""
    recorder = recorder_of_this_process()
    # Upstream's format has upstream's meaning: what the prefill after the retraction computed.
    if recorder is None or recorder.options.format == "sglang":
        return
    if req.return_routed_experts:
        answer.keep(recorder, req, req_to_token_pool)


@hook("managers.scheduler_components.output_sender.SenderWrapper.send_output", "AROUND")
def around_send_output(
    original: Callable[..., None], sender: Any, output: Any, recv_obj: Any = None, **others: Any
) -> None:
    """A request may have been aborted while it waited to be computed anew: its tokens are returned with their masks.

    The message by which SGLang tells of an abort in the queue has no room for them. A request that ends in a batch is
    told of by the output streamer, with all its tokens and log-probabilities, too.
    """
    recorder = recorder_of_this_process()
    if recorder is None or recorder.stream_output is None or not answer.has_kept(recv_obj):
        return original(sender, output, recv_obj, **others)
    from sglang.srt.managers.io_struct import AbortReq
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    if not isinstance(output, AbortReq) or recv_obj.finished_output:
        return original(sender, output, recv_obj, **others)
    reason = output.finished_reason or {}
    message = reason.get("message") or output.abort_message or "Abort in waiting queue"
    before = recv_obj.finished_reason
    recv_obj.finished_reason = FINISH_ABORT(message, reason.get("status_code"), reason.get("err_type"))
    answer.collect_kept(recorder, recv_obj)
    recorder.stream_output([recv_obj], recv_obj.return_logprob)
    # Only a rank that answers comes here, and a session's next turn must find the same on all of them.
    recv_obj.finished_reason = before


@hook("managers.scheduler.Scheduler.get_output_streamer_class", "AFTER")
def after_get_output_streamer_class(streamer_class: Any, scheduler: Any, **others: Any) -> type | None:
    """A streamer that adds each finished request's handle to its meta_info."""
    recorder = recorder_of_this_process()
    if recorder is None and other_rank_of_this_process() is None and options_of_this_process() is not None:
        refusals.stop(
            SeamError(
                "the scheduler asked for its output streamer before it had a recorder, so that answers would lack their"
                " masks without a word: expected the experts capturer of this server to be made first"
            )
        )
    if recorder is None or recorder.options.format == "sglang":
        return None
    inherited = streamer_class.build_additional_customized_info
    recorder.stream_output = lambda reqs, return_logprob: scheduler.output_streamer.stream_output(reqs, return_logprob)

    class RoutingMasksStreamer(streamer_class):
        """SGLang's output streamer, with `meta_info["routing_masks"]`: a list that holds the request's handle."""

        __slots__ = ()
        has_additional_customized_info = True

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list]:
            info = inherited(self, reqs)
            found = [answer.handles(req) for req in reqs]
            return {**info, answer.META_INFO_KEY: found} if any(found) else info

    return RoutingMasksStreamer
