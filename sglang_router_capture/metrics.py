"""A recorder's status as Prometheus metrics, in the directory that SGLang's own are in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_router_capture import status
from sglang_router_capture.recorder import Recorder

_PREFIX = "router_capture"


class Metrics:
    """Counters of rows, and gauges of tables and log, of one scheduler.

    prometheus_client decides when it is imported whether it writes into SGLang's directory, so this may be made in a
    scheduler only, where SGLang has made metrics of its own.

    Args:
        labels: of SGLang's metrics of this scheduler.
    """

    def __init__(self, recorder: Recorder, labels: Mapping[str, Any]) -> None:
        from prometheus_client import Counter, Gauge

        self._recorder = recorder
        self._labels = dict(labels)
        self._told: dict[str, int] = {}
        names = list(self._labels)
        self._rows = Counter(f"{_PREFIX}_rows", "Rows by what became of them.", [*names, "event"])
        self._table_bytes = Gauge(
            f"{_PREFIX}_table_bytes",
            "Host memory of a table of rows.",
            [*names, "table"],
            multiprocess_mode="mostrecent",
        )
        self._requests = Counter(f"{_PREFIX}_requests", "Requests by what became of their masks.", [*names, "event"])
        self._waiting = Gauge(
            f"{_PREFIX}_store_waiting_bytes",
            "Rows on their way into the store.",
            names,
            multiprocess_mode="mostrecent",
        )
        self._log = Gauge(
            f"{_PREFIX}_log_entries",
            "Passes and events that are not applied to the tables yet.",
            names,
            multiprocess_mode="mostrecent",
        )

    def publish(self) -> None:
        """Write the present values."""
        self._count(self._rows, status.rows(self._recorder))
        stored = status.stored(self._recorder)
        self._waiting.labels(**self._labels).set(stored.pop("waiting_bytes", 0))
        self._count(self._requests, stored)
        for name, table in status.tables(self._recorder).items():
            self._table_bytes.labels(**self._labels, table=name).set(status.table_bytes(table))
        self._log.labels(**self._labels).set(len(self._recorder.log))

    def _count(self, counter: Any, counts: Mapping[str, int]) -> None:
        for event, count in counts.items():
            counter.labels(**self._labels, event=event).inc(count - self._told.get(event, 0))
            self._told[event] = count
