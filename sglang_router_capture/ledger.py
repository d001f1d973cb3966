"""The ledger: every SGLang name that we touch, what we expect of it, why, and when the entry can go.

Tested with SGLang 0.5.23. `seam_check` compares the ledger with the installed SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass

TESTED_VERSIONS = ("0.5.23",)
PREFIX = "sglang.srt."
"""Of every path in the ledger."""


@dataclass(frozen=True)
class Seam:
    """One upstream name.

    Attributes:
        path: dotted path below `sglang.srt`.
        parameters: names of its parameters in order; None for a class or a plain value, where existence is checked.
        hooked: whether a hook is put there; the others are called or replaced.
        why: what we need it for.
        until: what would make the entry unnecessary.
    """

    path: str
    parameters: tuple[str, ...] | None
    hooked: bool
    why: str
    until: str

    @property
    def target(self) -> str:
        """Full dotted path."""
        return PREFIX + self.path


_FLAGS = "SGLang lets plugins declare server flags"
_CAPTURER = "SGLang lets plugins provide the experts capturer"
_ALLOCATIONS = "SGLang's KV allocators announce the slots that they hand out"
_STABLE = "never: this is the interface that a capturer stands in for"

SEAMS = (
    Seam("server_args.ServerArgs.add_cli_args", ("parser",), True, "our flags on the command line", _FLAGS),
    Seam("server_args.ServerArgs.from_cli_args", ("cls", "args"), True, "read our flags", _FLAGS),
    Seam(
        "server_args.ServerArgs.resolve_once",
        ("self",),
        True,
        "turn on what keeps fused routers away, and refuse what cannot be captured",
        _FLAGS,
    ),
    Seam(
        "state_capturer.routed_experts.RoutedExpertsCapturer.create",
        ("model", "model_config", "num_tokens", "max_running_requests", "device"),
        True,
        "put our recorder where upstream puts its capturer",
        _CAPTURER,
    ),
    Seam(
        "model_executor.model_runner.ModelRunner.init_routed_experts_capturer",
        ("self",),
        True,
        "tell the recorder which KV allocator to follow",
        _CAPTURER,
    ),
    Seam(
        "mem_cache.allocator.token.TokenToKVPoolAllocator.alloc",
        ("self", "need_size"),
        True,
        "a slot handed out has a new occupant",
        _ALLOCATIONS,
    ),
    Seam(
        "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc",
        ("self", "need_size"),
        True,
        "the same for whole pages",
        _ALLOCATIONS,
    ),
    Seam(
        "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_extend",
        (
            "self",
            "prefix_lens",
            "prefix_lens_cpu",
            "seq_lens",
            "seq_lens_cpu",
            "last_loc",
            "extend_num_tokens",
            "num_new_pages",
        ),
        True,
        "the same for a prefill with pages",
        _ALLOCATIONS,
    ),
    Seam(
        "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_decode",
        ("self", "seq_lens", "seq_lens_cpu", "last_loc"),
        True,
        "the same for a decode step with pages",
        _ALLOCATIONS,
    ),
    Seam(
        "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor._maybe_collect_routed_experts",
        ("self", "req"),
        True,
        "a finished request still holds its KV slots here",
        "SGLang calls the capturer with the request and not with its pool index",
    ),
    Seam(
        "managers.schedule_batch.release_req",
        (
            "req",
            "remaing_req_count",
            "req_to_token_pool",
            "token_to_kv_pool_allocator",
            "tree_cache",
            "hisparse_coordinator",
            "offload_kv",
        ),
        True,
        "a retracted request still holds its KV slots here",
        "SGLang keeps what a retracted request had captured",
    ),
    Seam(
        "managers.schedule_batch.Req.output_ids_through_stop",
        None,
        False,
        "the tokens that an answer returns",
        _STABLE,
    ),
    Seam(
        "managers.scheduler.Scheduler.get_output_streamer_class",
        ("self",),
        True,
        "our streamer adds routing_masks to meta_info",
        "SGLang takes plugins' meta_info fields without a subclass",
    ),
    Seam(
        "managers.scheduler_components.output_streamer.SchedulerOutputStreamer.build_additional_customized_info",
        ("self", "reqs"),
        False,
        "upstream's own extension point for meta_info, which our streamer overrides",
        _STABLE,
    ),
    Seam(
        "state_capturer.base.BaseTopkCapturer.on_forward_end",
        ("self", "forward_batch", "can_run_graph", "cuda_graph_batch", "no_copy_to_cpu"),
        False,
        "overridden by the recorder",
        _STABLE,
    ),
    Seam(
        "state_capturer.base.BaseTopkCapturer.get_topk",
        ("self", "req_pool_idx", "seqlen", "req_to_token_pool", "start_len"),
        False,
        "overridden by the recorder",
        _STABLE,
    ),
    Seam(
        "state_capturer.routed_experts.RoutedExpertsCapturer.capture",
        ("self", "layer_id", "topk_indices"),
        False,
        "kept by the recorder: shared experts and scattered tokens are upstream's knowledge",
        _STABLE,
    ),
    Seam(
        "state_capturer.base.TopkCaptureOutput.map_device_tensors",
        ("self", "fn"),
        False,
        "PassRecord stands in for this class",
        _STABLE,
    ),
    Seam(
        "state_capturer.base.TopkCaptureOutput.finalize",
        ("self",),
        False,
        "PassRecord stands in for this class",
        _STABLE,
    ),
    Seam(
        "state_capturer.routed_experts.get_global_experts_capturer",
        (),
        False,
        "the recorder of this process, from a hook",
        _STABLE,
    ),
    Seam(
        "plugins.hook_registry.HookRegistry.register",
        ("cls", "target", "hook", "hook_type", "source"),
        False,
        "the seam on which all hooks stand",
        _STABLE,
    ),
    Seam("layers.moe.topk.TopK", None, False, "find the live routers, and see whether they report", _CAPTURER),
    Seam("layers.moe.hash_topk.HashTopK", None, False, "refuse routing that is not learned", _CAPTURER),
    Seam("layers.moe.topk.TopKOutputFormat.BYPASSED", None, False, "refuse routers fused into the experts", _CAPTURER),
    Seam("layers.moe.topk.TopKOutputFormat.TRITON_KERNEL", None, False, "refuse a backend without ids", _CAPTURER),
    Seam(
        "arg_groups.overrides.resolving_view", ("server_args",), False, "read the resolved server configuration", _FLAGS
    ),
    Seam("runtime_context.get_serving", (), False, "the weight version that the scheduler serves", _CAPTURER),
    Seam("runtime_context.get_schedule", (), False, "tokens that one forward pass may have", _CAPTURER),
    Seam(
        "plugins.hook_registry._wrap_fn",
        ("original_fn", "hook", "hook_type"),
        False,
        "its wrappers hold the hook, by which we see that ours were applied",
        "SGLang says which plugin's hooks it applied",
    ),
)
