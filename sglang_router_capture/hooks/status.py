"""Hooks by which operators see what is captured: SGLang's internal state, its HTTP server and its metrics."""

from __future__ import annotations

import sys
from typing import Any

from sglang_router_capture import http, status
from sglang_router_capture.hooks.process import options_of_this_process, recorder_of_this_process
from sglang_router_capture.hooks.registry import hook
from sglang_router_capture.metrics import Metrics

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
    if server is not None and options_of_this_process() is not None:
        http.add_route(server.app, manager.get_internal_state)


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
