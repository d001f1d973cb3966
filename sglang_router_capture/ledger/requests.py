"""The ledger's rows of a request from its retraction to its answer."""

from __future__ import annotations

from router_replay.upstream import Attribute, Seam

_META_INFO = "SGLang takes plugins' meta_info fields without a subclass"
_ABORTED = "SGLang answers requests that are aborted in the queue as others"
_STABLE = "never: this is the interface that a capturer stands in for"
_STREAMER = "managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
_PROCESSOR = "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
_REQ = "managers.schedule_batch.Req"
_CAPTURE_TESTS = "tests/sglang_router_capture/test_capture.py"
_ROUTES_TEST = f"{_CAPTURE_TESTS}::test_rows_are_the_models_routes"
_DELTAS_TEST = f"{_CAPTURE_TESTS}::test_deltas_give_the_rows_of_the_whole"
_RETRACTION_TEST = f"{_CAPTURE_TESTS}::test_concurrent_requests_with_retraction"
_ABORT_TEST = "tests/sglang_router_capture/test_aborts.py::test_tokens_of_a_request_aborted_in_the_queue"

SEAMS = (
    Seam(
        f"{_PROCESSOR}._maybe_collect_routed_experts",
        ("req",),
        "hooked by hooks.requests.around_collect",
        "a finished request still holds its KV slots there",
        "SGLang calls the capturer with the request and not with its pool index",
    ),
    Seam(
        "managers.schedule_batch.release_req",
        ("*", "req", "req_to_token_pool"),
        "hooked by hooks.requests.before_release_req",
        "a retracted request still holds its KV slots there",
        "SGLang keeps what a retracted request had captured",
    ),
    Seam(
        "managers.scheduler.Scheduler.get_output_streamer_class",
        (),
        "hooked by hooks.requests.after_get_output_streamer_class",
        "our streamer adds routing_masks to meta_info",
        _META_INFO,
    ),
    Seam(
        "managers.scheduler_components.output_sender.SenderWrapper.send_output",
        ("output", "recv_obj"),
        "hooked by hooks.requests.around_send_output",
        "a request that is aborted in the queue leaves there, and what it had sampled has masks",
        _ABORTED,
    ),
    Seam(
        "managers.io_struct.AbortReq",
        None,
        "read by hooks.requests.around_send_output",
        "the scheduler tells of such a request by it",
        _ABORTED,
    ),
    Seam(
        "managers.schedule_batch.FINISH_ABORT",
        ("message", "status_code", "err_type"),
        "called by hooks.requests.around_send_output",
        "the request ends as others that are aborted do",
        _ABORTED,
    ),
    Seam(
        f"{_STREAMER}.stream_output",
        ("reqs", "return_logprob"),
        "called by hooks.requests.around_send_output",
        "it sends what has not been sent, with the masks",
        _ABORTED,
    ),
    Seam(
        f"{_STREAMER}.build_additional_customized_info",
        ("reqs",),
        "overridden by hooks.requests.after_get_output_streamer_class",
        "it is SGLang's own place for further fields of meta_info",
        _META_INFO,
    ),
    Seam(
        f"{_STREAMER}.has_additional_customized_info",
        None,
        "overridden by hooks.requests.after_get_output_streamer_class",
        "SGLang asks for further fields only where it is set",
        _META_INFO,
    ),
    Seam(
        f"{_REQ}.output_ids_through_stop",
        None,
        "read by answer.collect",
        "rows belong to the tokens that the answer returns",
        _STABLE,
    ),
    Seam(
        f"{_PROCESSOR}.req_to_token_pool",
        None,
        "read by hooks.requests.around_collect",
        "it names the slots of a request's tokens",
        _STABLE,
    ),
)

ATTRIBUTES = (
    Attribute(
        _REQ,
        "return_routed_experts",
        "read by hooks.requests.around_collect",
        "a request that does not ask gets no masks",
        f"{_CAPTURE_TESTS}::test_request_that_does_not_ask_gets_no_masks",
    ),
    Attribute(
        _REQ,
        "sampling_params",
        "read by hooks.requests.around_collect",
        "SGLang sends a prompt of several choices once more, to fill the cache, and nobody reads that answer",
        "tests/sglang_router_capture/test_server_store.py::test_every_answer_has_its_own_masks",
    ),
    Attribute(
        _REQ,
        "routed_experts",
        "read by hooks.requests.around_collect",
        "SGLang sends what it holds",
        "tests/sglang_router_capture/test_sglang_format.py::test_bytes_are_upstreams",
    ),
    Attribute(
        _REQ,
        "routed_experts_start_len",
        "read by answer.collect",
        "a request may ask for the rows of its last tokens only",
        _DELTAS_TEST,
    ),
    Attribute(
        _REQ,
        "origin_input_ids",
        "read by answer.collect",
        "the prompt's tokens are part of the digest",
        _ROUTES_TEST,
    ),
    Attribute(
        _REQ,
        "output_ids",
        "read by answer.keep",
        "a retracted request's sampled tokens keep their rows",
        _RETRACTION_TEST,
    ),
    Attribute(
        _REQ,
        "kv",
        "read by answer.collect",
        "it holds the index by which the request's KV slots are found",
        _ROUTES_TEST,
    ),
    Attribute(
        "managers.schedule_batch.ReqKvInfo",
        "req_pool_idx",
        "read by answer.collect",
        "it is the index by which the request's KV slots are found",
        _ROUTES_TEST,
    ),
    Attribute(
        "managers.scheduler.Scheduler",
        "output_streamer",
        "read by hooks.requests.after_get_output_streamer_class",
        "it sends what has not been sent, with the masks",
        _ABORT_TEST,
    ),
    Attribute(
        "managers.io_struct.AbortReq",
        "finished_reason",
        "read by hooks.requests.around_send_output",
        "the answer says why the request was aborted",
        _ABORT_TEST,
    ),
    Attribute(
        "managers.io_struct.AbortReq",
        "abort_message",
        "read by hooks.requests.around_send_output",
        "the answer says why the request was aborted",
        _ABORT_TEST,
    ),
    Attribute(
        _REQ,
        "finished_reason",
        "read by hooks.requests.around_send_output",
        "a request is finished once it is set",
        _ABORT_TEST,
    ),
    Attribute(
        _REQ,
        "finished_output",
        "read by hooks.requests.around_send_output",
        "a request is answered once",
        _ABORT_TEST,
    ),
    Attribute(
        _REQ,
        "return_logprob",
        "read by hooks.requests.around_send_output",
        "the log-probabilities of what it had sampled are returned, too",
        _ABORT_TEST,
    ),
)
