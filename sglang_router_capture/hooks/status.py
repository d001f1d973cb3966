"""Hooks by which operators see what is captured: SGLang's internal state, its HTTP server and its metrics."""

from __future__ import annotations

import sys
from typing import Any

from router_replay.errors import UnsupportedError
from router_replay.masks.stores.served import ServedDirectory
from sglang_router_capture import http, options, refusals, status
from sglang_router_capture.hooks.process import recorder_of_this_process
from sglang_router_capture.hooks.registry import hook
from sglang_router_capture.metrics import Metrics
from sglang_router_capture.server_store import store_of

_SERVER = "sglang.srt.entrypoints.http_server"
_METRICS = "_router_capture_metrics"


@hook("managers.scheduler.Scheduler.get_internal_state", "AFTER")
def after_get_internal_state(output: Any, scheduler: Any, *args: Any, **others: Any) -> None:
    """A scheduler answers what state it is in, for `/server_info` and for our own page."""
    if recorder := recorder_of_this_process():
        output.internal_state[http.STATE_KEY] = status.status(recorder)


@hook("managers.tokenizer_manager.TokenizerManager.__init__", "AFTER")
def after_tokenizer_manager_init(result: None, manager: Any, *args: Any, **others: Any) -> None:
    """The process that asks the schedulers is ready to; it is the HTTP server's, where there is one."""
    server = sys.modules.get(_SERVER)
    chosen = options.of(manager.server_args)
    if chosen is None:
        return
    store = store_of(chosen)
    if server is None:
        if isinstance(store, ServedDirectory):
            refusals.stop(
                UnsupportedError(
                    f"{options.STORE_FLAG} {chosen.store} needs SGLang's HTTP server, and this is an engine without"
                    " one: choose another store, or none for masks in the answers"
                )
            )
        return
    http.add_route(server.app, manager.get_internal_state)
    if isinstance(store, ServedDirectory):
        http.add_masks_route(server.app, store)


@hook("observability.metrics_collector.SchedulerMetricsCollector.log_stats", "AFTER")
def after_log_stats(result: None, collector: Any, *args: Any, **others: Any) -> None:
    """A scheduler with metrics writes them."""
    recorder = recorder_of_this_process()
    if recorder is None:
        return
    metrics = getattr(collector, _METRICS, None)
    if metrics is None:
        metrics = Metrics(recorder, collector.labels)
        setattr(collector, _METRICS, metrics)
    metrics.publish()
