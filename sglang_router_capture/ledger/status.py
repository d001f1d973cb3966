"""The ledger's rows of SGLang's internal state, its HTTP server and its metrics."""

from __future__ import annotations

from router_replay.upstream import Attribute, Seam

_STATE = "SGLang lets plugins add to its internal state"
_PAGES = "SGLang lets plugins add HTTP routes"
_METRICS = "SGLang lets plugins add metrics"
_COLLECTOR = "observability.metrics_collector.SchedulerMetricsCollector"
_TESTS = "tests/sglang_router_capture/test_status.py"

SEAMS = (
    Seam(
        "managers.scheduler.Scheduler.get_internal_state",
        (),
        "hooked by hooks.status.after_get_internal_state",
        "it is what a scheduler tells the HTTP server of itself",
        _STATE,
    ),
    Seam(
        "managers.io_struct.GetInternalStateReqOutput",
        None,
        "read by hooks.status.after_get_internal_state",
        "it holds the state, to which ours is added",
        _STATE,
    ),
    Seam(
        "managers.tokenizer_manager.TokenizerManager.__init__",
        (),
        "hooked by hooks.status.after_tokenizer_manager_init",
        "the HTTP server gets a page that asks the schedulers",
        _PAGES,
    ),
    Seam(
        "managers.tokenizer_control_mixin.TokenizerControlMixin.get_internal_state",
        (),
        "called by hooks.status.after_tokenizer_manager_init",
        "it asks every scheduler that answers requests",
        _PAGES,
    ),
    Seam(
        "entrypoints.http_server.app",
        None,
        "read by hooks.status.after_tokenizer_manager_init",
        "it is the application that serves our page",
        _PAGES,
    ),
    Seam(
        f"{_COLLECTOR}.log_stats",
        (),
        "hooked by hooks.status.after_log_stats",
        "that is where a scheduler writes its metrics",
        _METRICS,
    ),
)

ATTRIBUTES = (
    Attribute(
        _COLLECTOR,
        "labels",
        "read by hooks.status.after_log_stats",
        "our metrics have the labels of SGLang's",
        f"{_TESTS}::test_metrics",
    ),
)
