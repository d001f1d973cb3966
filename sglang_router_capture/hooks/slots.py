"""Hooks on the KV allocators, and on the scheduler when no batch runs."""

from __future__ import annotations

from typing import Any

from sglang_router_capture.hooks.process import recorder_of_this_process
from sglang_router_capture.hooks.registry import hook


@hook("mem_cache.allocator.token.TokenToKVPoolAllocator.alloc", "AFTER")
@hook("mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc", "AFTER")
@hook("mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_extend", "AFTER")
@hook("mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_decode", "AFTER")
def after_alloc(slots: Any, allocator: Any, *args: Any, **kwargs: Any) -> None:
    """A KV allocator handed out slots, whichever of its methods was called."""
    if recorder := recorder_of_this_process():
        recorder.slots_allocated(allocator, slots)


@hook("managers.scheduler.Scheduler.on_idle", "BEFORE")
def before_on_idle(scheduler: Any, **others: Any) -> None:
    """No batch runs, and no pass will come by which the log would be applied."""
    if recorder := recorder_of_this_process():
        recorder.settle()


@hook("managers.scheduler.Scheduler.pause_generation", "AFTER")
def after_pause_generation(result: Any, scheduler: Any, *args: Any, **others: Any) -> None:
    """A paused scheduler runs nothing and is not idle, while rows may be waited for: SGLang's storage threads go on."""
    if recorder := recorder_of_this_process():
        recorder.settle()
