"""An SGLang plugin of the benchmark: times the scheduler's thread at the end of requests, and supplies a slow store.

Found by its metadata, since this folder is on the server's path. It imports nothing of the project, whose presence in
a server of stock SGLang would be part of what is measured.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, TextIO

from fsspec.implementations.local import LocalFileSystem

RECORDS = "ROUTER_CAPTURE_PAUSE_RECORDS"
LONG = "ROUTER_CAPTURE_PAUSE_LONG"
SLOW_SECONDS = "ROUTER_CAPTURE_PAUSE_SLOW_SECONDS"
SLOW = "slowfile"

_EVENT_LOOP = "sglang.srt.managers.scheduler.Scheduler.run_event_loop"


class SlowFileSystem(LocalFileSystem):
    """Local files, each of which takes its time to be written."""

    protocol = SLOW

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).removeprefix(f"{SLOW}://"))

    def pipe_file(self, path: str, value: bytes, **others: Any) -> None:
        """Write a file, some time later."""
        time.sleep(float(os.environ.get(SLOW_SECONDS, "0")))
        super().pipe_file(path, value, **others)


def supply_slow_store() -> None:
    """Let stores of this process be `slowfile:///folder`."""
    import fsspec

    # By name, as packages tell of theirs: only these are known before they are used.
    fsspec.register_implementation(SLOW, f"{__name__}.{SlowFileSystem.__name__}", clobber=True)


def load() -> None:
    """Called by SGLang in each of a server's processes."""
    supply_slow_store()
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_EVENT_LOOP, before_event_loop, HookType.BEFORE)


def before_event_loop(scheduler: Any, *args: Any, **others: Any) -> None:
    """Every other hook is in place: what is timed from here on holds all that anybody added."""
    if path := os.environ.get(RECORDS):
        measure(open(path, "a", buffering=1), int(os.environ[LONG]))  # noqa: SIM115, as long as the process runs


def measure(records: TextIO, long: int) -> None:
    """Write a line for each batch whose results a scheduler takes: what its thread did for requests that ended.

    Times are wall and CPU seconds of the thread. `at`: when the thread turned to the results, on the clock that all
    processes of a machine share. `ended`, `asked`: requests with a prompt of `long` tokens and more that ended in it,
    and those of them that asked for their routes. `collected`: what was done for each of the latter before its slots
    are released. `sent`: the message with the batch's answers, made and sent. `table`: what changes of the slot table
    took. `whole`: all that is done with the results, these three included.
    """
    import sys

    from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor
    from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

    line: dict[str, Any] = {}

    def begin(*_: Any) -> None:
        line.update(at=time.monotonic(), ended=0, asked=0, collected=[], sent=[0.0, 0.0], table=[0.0, 0.0])

    def collected(taken: list[float], _: Any, req: Any, *__: Any) -> None:
        if line and len(req.origin_input_ids) >= long:
            line["ended"] += 1
            if req.return_routed_experts:
                line["asked"] += 1
                line["collected"].append(taken)

    def adds_to(name: str) -> Callable[..., None]:
        def add(taken: list[float], *_: Any) -> None:
            if line:
                line[name] = [a + b for a, b in zip(line[name], taken, strict=True)]

        return add

    def end(taken: list[float], *_: Any) -> None:
        records.write(json.dumps({**line, "whole": taken}) + "\n")
        line.clear()

    for name in ("process_batch_result_decode", "process_batch_result_prefill"):
        time_calls(SchedulerBatchResultProcessor, name, end, before=begin)
    time_calls(SchedulerBatchResultProcessor, "_maybe_collect_routed_experts", collected)
    time_calls(SchedulerOutputStreamer, "stream_output", adds_to("sent"))
    if table := sys.modules.get("sglang_router_capture.slot_table"):
        for name in ("release", "write"):
            time_calls(table.SlotTable, name, adds_to("table"))


def time_calls(
    owner: type, name: str, after: Callable[..., None], *, before: Callable[..., None] = lambda *_: None
) -> None:
    """Put a stopwatch around a method: `after` is called with wall and CPU seconds and the arguments."""
    original = getattr(owner, name)

    @wraps(original)
    def timed(*args: Any, **others: Any) -> Any:
        before(*args)
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            return original(*args, **others)
        finally:
            after([time.perf_counter() - wall, time.thread_time() - cpu], *args)

    setattr(owner, name, timed)
