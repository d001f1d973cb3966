"""The ledger: every SGLang name that we hook, call, override or read, why, and when the row can go."""

from __future__ import annotations

from router_replay.upstream import At, Attribute, Ledger, Seam

_FLAGS = "SGLang lets plugins declare server flags"
_CAPTURER = "SGLang lets plugins provide the experts capturer"
_ALLOCATIONS = "SGLang's KV allocators announce the slots that they hand out"
_META_INFO = "SGLang takes plugins' meta_info fields without a subclass"
_STABLE = "never: this is the interface that a capturer stands in for"
_SETTLED = "never: this is where SGLang keeps it"

_STREAMER = "managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
_PROCESSOR = "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
_REQ = "managers.schedule_batch.Req"
_CAPTURE_TESTS = "tests/sglang_router_capture/test_capture.py"
_ROUTES_TEST = f"{_CAPTURE_TESTS}::test_rows_are_the_models_routes"
_DELTAS_TEST = f"{_CAPTURE_TESTS}::test_deltas_give_the_rows_of_the_whole"
_RETRACTION_TEST = f"{_CAPTURE_TESTS}::test_concurrent_requests_with_retraction"

FUSED_SHARED_EXPERTS = Seam(
    (
        At("layers.moe.utils.resolve_shared_experts_config", ">=0.5.23"),
        At("layers.moe.utils.install_shared_experts_fusion_decision", "<0.5.23"),
    ),
    (),
    "relied on by hooks.num_fused_shared_experts",
    "what it decides, and where it leaves that, is how many columns of shared experts follow the routed ones",
    _CAPTURER,
)

_HOOKED = (
    Seam(
        "server_args.ServerArgs.add_cli_args",
        ("parser",),
        "hooked by hooks.after_add_cli_args",
        "our flags belong on the server's command line",
        _FLAGS,
    ),
    Seam(
        "server_args.ServerArgs.from_cli_args",
        ("args",),
        "hooked by hooks.after_from_cli_args",
        "our flags are read from the parsed command line, and SGLang drops what it does not know",
        _FLAGS,
    ),
    Seam(
        "server_args.ServerArgs.resolve_once",
        (),
        "hooked by hooks.around_resolve_once",
        "fused routers must be kept away before the settings are final, and settings be refused once they are",
        _FLAGS,
    ),
    Seam(
        "state_capturer.routed_experts.RoutedExpertsCapturer.create",
        ("*", "model", "model_config", "num_tokens", "max_running_requests", "device"),
        "hooked by hooks.around_create",
        "our recorder takes the place of SGLang's capturer there",
        _CAPTURER,
    ),
    Seam(
        "model_executor.model_runner.ModelRunner.init_routed_experts_capturer",
        (),
        "hooked by hooks.after_init_routed_experts_capturer",
        "the recorder has to be told which KV allocator to follow",
        _CAPTURER,
    ),
    Seam(
        "mem_cache.allocator.token.TokenToKVPoolAllocator.alloc",
        (),
        "hooked by hooks.after_alloc",
        "a slot that is handed out has a new occupant",
        _ALLOCATIONS,
    ),
    Seam(
        "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc",
        (),
        "hooked by hooks.after_alloc",
        "the slots of pages that are handed out have new occupants",
        _ALLOCATIONS,
    ),
    Seam(
        "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_extend",
        (),
        "hooked by hooks.after_alloc",
        "the slots that a prefill gets have new occupants",
        _ALLOCATIONS,
    ),
    Seam(
        "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_decode",
        (),
        "hooked by hooks.after_alloc",
        "the slots that a decode step gets have new occupants",
        _ALLOCATIONS,
    ),
    Seam(
        f"{_PROCESSOR}._maybe_collect_routed_experts",
        ("req",),
        "hooked by hooks.around_collect",
        "a finished request still holds its KV slots there",
        "SGLang calls the capturer with the request and not with its pool index",
    ),
    Seam(
        "managers.schedule_batch.release_req",
        ("*", "req", "req_to_token_pool"),
        "hooked by hooks.before_release_req",
        "a retracted request still holds its KV slots there",
        "SGLang keeps what a retracted request had captured",
    ),
    Seam(
        "managers.scheduler.Scheduler.get_output_streamer_class",
        (),
        "hooked by hooks.after_get_output_streamer_class",
        "our streamer adds routing_masks to meta_info",
        _META_INFO,
    ),
)

_CALLED = (
    Seam(
        "plugins.hook_registry.HookRegistry.register",
        ("target", "hook", "hook_type"),
        "called by plugin.load",
        "it is the seam on which all hooks stand",
        _STABLE,
    ),
    Seam(
        "plugins.hook_registry.HookType.AFTER",
        None,
        "read by plugin.load",
        "a hook after a function sees what that returned",
        _STABLE,
    ),
    Seam(
        "plugins.hook_registry.HookType.AROUND",
        None,
        "read by plugin.load",
        "a hook around a function decides whether that runs",
        _STABLE,
    ),
    Seam(
        "plugins.hook_registry.HookType.BEFORE",
        None,
        "read by plugin.load",
        "a hook before a function sees what that is about to change",
        _STABLE,
    ),
    Seam(
        "plugins.hook_registry._wrap_fn",
        ("original_fn", "hook", "hook_type"),
        "relied on by seam_check.require_applied",
        "its wrappers hold the hook, which is how we see that ours were applied",
        "SGLang says which plugin's hooks it applied",
    ),
    Seam(
        "arg_groups.overrides.resolving_view",
        ("server_args",),
        "called by hooks.around_resolve_once",
        "settings are refused by what the server resolved them to",
        _FLAGS,
    ),
    Seam(
        "runtime_context.get_schedule",
        (),
        "called by hooks.around_create",
        "the staging buffer must hold the tokens of the largest forward pass",
        _CAPTURER,
    ),
    Seam(
        "runtime_context.get_serving",
        (),
        "called by recorder.Recorder.on_forward_end",
        "every row carries the version of the weights that computed it",
        _CAPTURER,
    ),
    Seam(
        "state_capturer.routed_experts.get_global_experts_capturer",
        (),
        "called by hooks.after_alloc",
        "a hook has to find the recorder of its process",
        _STABLE,
    ),
)

_CAPTURER_OURS = (
    Seam(
        "state_capturer.routed_experts.RoutedExpertsCapturer",
        None,
        "inherited by recorder.Recorder",
        "SGLang hands the routes to an object of this class",
        _STABLE,
    ),
    Seam(
        "state_capturer.routed_experts.RoutedExpertsCapturer.capture",
        ("layer_id", "topk_indices"),
        "inherited by recorder.Recorder",
        "SGLang itself knows the columns of shared experts and the tokens of other ranks",
        _STABLE,
    ),
    Seam(
        "state_capturer.base.BaseTopkCapturer.on_forward_end",
        ("forward_batch", "can_run_graph", "cuda_graph_batch", "no_copy_to_cpu"),
        "overridden by recorder.Recorder.on_forward_end",
        "the routes of a forward pass are packed at its end",
        _STABLE,
    ),
    Seam(
        "state_capturer.base.BaseTopkCapturer.get_topk",
        ("req_pool_idx", "seqlen", "req_to_token_pool", "start_len"),
        "overridden by recorder.Recorder.get_topk",
        "SGLang's own format is answered from our table",
        _STABLE,
    ),
    Seam(
        "state_capturer.base.BaseTopkCapturer.destroy",
        (),
        "overridden by recorder.Recorder.destroy",
        "SGLang lets the buffers of a capturer go that it has no more use for, and ours are others",
        _STABLE,
    ),
    Seam(
        "state_capturer.base.BaseDeviceCache.capture",
        ("layer_id", "topk_indices"),
        "answered by staging.Staging.capture",
        "SGLang's capturer hands each layer's choice to its device buffer",
        _STABLE,
    ),
    Seam(
        "state_capturer.base.TopkCaptureOutput.map_device_tensors",
        ("fn",),
        "answered by recorder.PassRecord.map_device_tensors",
        "a pass's rows are copied to the host with its other results",
        _STABLE,
    ),
    Seam(
        "state_capturer.base.TopkCaptureOutput.finalize",
        (),
        "answered by recorder.PassRecord.finalize",
        "a pass's rows go into the table once they are copied",
        _STABLE,
    ),
    Seam(
        f"{_STREAMER}.build_additional_customized_info",
        ("reqs",),
        "overridden by hooks.after_get_output_streamer_class",
        "it is SGLang's own place for further fields of meta_info",
        _META_INFO,
    ),
    Seam(
        f"{_STREAMER}.has_additional_customized_info",
        None,
        "overridden by hooks.after_get_output_streamer_class",
        "SGLang asks for further fields only where it is set",
        _META_INFO,
    ),
)

_READ = (
    FUSED_SHARED_EXPERTS,
    Seam(
        (At("configs.shared_experts.SharedExpertsConfig.num_fused_shared_experts", ">=0.5.23"),),
        None,
        "read by hooks.num_fused_shared_experts",
        "shared experts have columns after the routed ones",
        _CAPTURER,
    ),
    Seam(
        "arg_groups.fields.exec_.ExecFeatures.enable_return_routed_experts",
        None,
        "read by hooks.around_resolve_once",
        "SGLang keeps fused routers away only where it is set",
        _FLAGS,
    ),
    Seam(
        "arg_groups.fields.schedule.Schedule.chunked_prefill_size",
        None,
        "read by hooks.around_create",
        "a chunk limits the tokens of a forward pass",
        _CAPTURER,
    ),
    Seam(
        "arg_groups.fields.schedule.Schedule.max_prefill_tokens",
        None,
        "read by hooks.around_create",
        "without chunks it limits the tokens of a forward pass",
        _CAPTURER,
    ),
    Seam(
        "arg_groups.fields.serving.Serving.weight_version",
        None,
        "read by recorder.Recorder.on_forward_end",
        "every row carries the version of the weights that computed it",
        _CAPTURER,
    ),
    Seam(
        "model_executor.forward_batch_info.ForwardBatch.out_cache_loc",
        None,
        "read by recorder.Recorder.on_forward_end",
        "these are the slots that the pass wrote",
        _STABLE,
    ),
    Seam(
        "model_executor.forward_batch_info.ForwardBatch.out_cache_loc_virtual",
        None,
        "read by recorder.Recorder.on_forward_end",
        "these are the slots as requests name them, where the attention writes to others",
        _STABLE,
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
        "read by hooks.around_collect",
        "it names the slots of a request's tokens",
        _STABLE,
    ),
    Seam(
        "mem_cache.allocator.token.TokenToKVPoolAllocator",
        None,
        "read by refusals.require_supported_allocator",
        "only allocators whose hand-outs are heard can be followed",
        _ALLOCATIONS,
    ),
    Seam(
        "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator",
        None,
        "read by refusals.require_supported_allocator",
        "only allocators whose hand-outs are heard can be followed",
        _ALLOCATIONS,
    ),
    Seam(
        "layers.moe.topk.TopK",
        None,
        "read by refusals.require_reporting_routers",
        "the live routers are found by their class",
        _CAPTURER,
    ),
    Seam(
        "layers.moe.topk.TopKConfig.allow_routed_experts_capture",
        None,
        "read by refusals.require_reporting_routers",
        "a router that must not report would leave its layer empty",
        _CAPTURER,
    ),
    Seam(
        "layers.moe.topk.TopKConfig.output_format",
        None,
        "read by refusals.require_reporting_routers",
        "it tells whether a router's backend reports what it chose",
        _CAPTURER,
    ),
    Seam(
        "layers.moe.topk.TopKOutputFormat.BYPASSED",
        None,
        "read by refusals.require_reporting_routers",
        "routers that are fused into the experts report nothing",
        _CAPTURER,
    ),
    Seam(
        "layers.moe.topk.TopKOutputFormat.TRITON_KERNEL",
        None,
        "read by refusals.require_reporting_routers",
        "that backend has no ids to report",
        _CAPTURER,
    ),
    Seam(
        "layers.moe.hash_topk.HashTopK",
        None,
        "read by refusals.require_reporting_routers",
        "routing by a hash is not learned, and there is no choice to record",
        _CAPTURER,
    ),
)

_ATTRIBUTES = (
    Attribute(
        "server_args.ServerArgs",
        "_resolution_finished",
        "read by hooks.around_resolve_once",
        "settings that are final cannot be changed any more",
        "tests/sglang_router_capture/test_start.py::test_engine_with_the_environment_variable",
    ),
    Attribute(
        "configs.model_config.ModelConfig",
        "hf_text_config",
        "read by hooks.around_create",
        "the geometry of the masks is that of the model's configuration",
        _ROUTES_TEST,
    ),
    Attribute(
        "configs.model_config.ModelConfig",
        "context_len",
        "read by hooks.around_create",
        "without chunks the last prompt of a pass may be as long as that",
        _ROUTES_TEST,
    ),
    Attribute(
        None,
        "shared_experts_config",
        "read by hooks.num_fused_shared_experts",
        "SGLang's loader leaves a model's shared experts there",
        _ROUTES_TEST,
        releases=">=0.5.23",
    ),
    Attribute(
        "state_capturer.routed_experts.RoutedExpertsCapturer",
        "num_fused_shared_experts",
        "answered by recorder.Recorder",
        "the capture that the recorder keeps tells the columns of shared experts by it",
        _ROUTES_TEST,
    ),
    Attribute(
        None,
        "num_fused_shared_experts",
        "read by hooks.num_fused_shared_experts",
        "models that fuse shared experts say there how many",
        "tests/sglang_router_capture/test_seams.py::test_shared_experts_of_both_forms",
        releases="<0.5.23",
    ),
    Attribute(
        "model_executor.model_runner.ModelRunner",
        "is_draft_worker",
        "read by hooks.after_init_routed_experts_capturer",
        "the draft model's runner must not take the target's recorder",
        _ROUTES_TEST,
    ),
    Attribute(
        "model_executor.model_runner.ModelRunner",
        "token_to_kv_pool_allocator",
        "read by hooks.after_init_routed_experts_capturer",
        "this is the allocator that the recorder follows",
        f"{_CAPTURE_TESTS}::test_slots_that_changed_hands_return_the_new_tokens_rows",
    ),
    Attribute(
        "mem_cache.memory_pool.ReqToTokenPool",
        "req_to_token",
        "read by recorder.Recorder.slots_of",
        "it holds the slots of a request's tokens",
        _ROUTES_TEST,
    ),
    Attribute(
        "state_capturer.base.BaseTopkCapturer",
        "device_cache",
        "answered by recorder.Recorder",
        "upstream's capture hands each layer's choice to it, and reads its buffer",
        _ROUTES_TEST,
    ),
    Attribute(
        "state_capturer.base.BaseTopkCapturer",
        "topk_size",
        "answered by recorder.Recorder",
        "upstream's methods read the number of routed columns from it",
        _ROUTES_TEST,
    ),
    Attribute(
        "state_capturer.base.BaseDeviceCache",
        "buffer",
        "answered by staging.Staging",
        "upstream's capture reads the number of columns from its shape",
        _ROUTES_TEST,
    ),
    Attribute(
        "layers.moe.topk.TopK",
        "topk_config",
        "read by refusals.require_reporting_routers",
        "a live router says there whether it reports",
        _ROUTES_TEST,
    ),
    Attribute(
        "layers.moe.topk.TopK",
        "layer_id",
        "read by refusals.require_reporting_routers",
        "the layers that report are held against the model's configuration",
        _ROUTES_TEST,
    ),
    Attribute(
        "layers.moe.hash_topk.HashTopK",
        "layer_id",
        "read by refusals.require_reporting_routers",
        "the refusal names the layers that route by a hash",
        "tests/sglang_router_capture/test_seams.py::test_routers_by_hash_are_refused",
    ),
    Attribute(
        _REQ,
        "return_routed_experts",
        "read by hooks.around_collect",
        "a request that does not ask gets no masks",
        f"{_CAPTURE_TESTS}::test_request_that_does_not_ask_gets_no_masks",
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
)

LEDGER = Ledger(
    distribution="sglang",
    title="SGLang",
    prefix="sglang.srt.",
    subject="router capture",
    tested=("0.5.23",),
    checked=("0.5.20", "0.5.21", "0.5.22"),
    way_out="start the server without router capture",
    seams=_HOOKED + _CALLED + _CAPTURER_OURS + _READ,
    attributes=_ATTRIBUTES,
)
