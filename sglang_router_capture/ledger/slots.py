"""The ledger's rows of KV slots, who hands them out, and when nothing does."""

from __future__ import annotations

from router_replay.upstream import Seam

_ALLOCATIONS = "SGLang's KV allocators announce the slots that they hand out"
_STABLE = "never: this is the interface that a capturer stands in for"

SEAMS = (
    Seam(
        "mem_cache.allocator.token.TokenToKVPoolAllocator.alloc",
        (),
        "hooked by hooks.slots.after_alloc",
        "a slot that is handed out has a new occupant",
        _ALLOCATIONS,
    ),
    Seam(
        "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc",
        (),
        "hooked by hooks.slots.after_alloc",
        "the slots of pages that are handed out have new occupants",
        _ALLOCATIONS,
    ),
    Seam(
        "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_extend",
        (),
        "hooked by hooks.slots.after_alloc",
        "the slots that a prefill gets have new occupants",
        _ALLOCATIONS,
    ),
    Seam(
        "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_decode",
        (),
        "hooked by hooks.slots.after_alloc",
        "the slots that a decode step gets have new occupants",
        _ALLOCATIONS,
    ),
    Seam(
        "managers.scheduler.Scheduler.on_idle",
        (),
        "hooked by hooks.slots.before_on_idle",
        "what happened to slots after the last pass must reach the tables, too",
        "SGLang tells a capturer that the scheduler is idle",
    ),
    Seam(
        "managers.scheduler.Scheduler.pause_generation",
        (),
        "hooked by hooks.slots.after_pause_generation",
        "a paused scheduler is never idle, and rows must reach the tables all the same",
        "SGLang tells a capturer that the scheduler is idle",
    ),
    Seam(
        "state_capturer.routed_experts.get_global_experts_capturer",
        (),
        "called by hooks.process.recorder_of_this_process",
        "a hook has to find the recorder of its process",
        _STABLE,
    ),
    Seam(
        "mem_cache.allocator.token.TokenToKVPoolAllocator",
        None,
        "read by live_refusals.require_supported_allocator",
        "only allocators whose hand-outs are heard can be followed",
        _ALLOCATIONS,
    ),
    Seam(
        "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator",
        None,
        "read by live_refusals.require_supported_allocator",
        "only allocators whose hand-outs are heard can be followed",
        _ALLOCATIONS,
    ),
)

ATTRIBUTES = ()
