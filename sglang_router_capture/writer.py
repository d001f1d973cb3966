"""Masks of finished requests go into their store on threads of their own, and the scheduler does not wait for them."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from router_replay.masks import RoutingMasks, Store
from sglang_router_capture.mailbox import Mailbox, new_ticket, no_masks

logger = logging.getLogger(__name__)

MOST_BYTES = 4 << 30
"""Rows that may wait for a store; those of further requests are dropped, and their answers say so."""

# A store on another machine answers after some milliseconds, in which the next request's masks can be made.
_THREADS = 4
# SGLang gives a scheduler that is to stop a few seconds more than this.
_CLOSING_S = 5.0
_STOPPED = "the server stopped before the store had taken them"

_Job = tuple[dict[str, Any], Callable[[], RoutingMasks], int]


@dataclass
class WriteCounts:
    """Requests by what became of their masks, and what waits.

    Attributes:
        stored: requests whose masks are in the store.
        failed: requests whose masks the store did not take.
        dropped: requests whose masks were not given to it, since too much waited already.
        waiting_bytes: rows that are on their way into the store now.
    """

    stored: int = 0
    failed: int = 0
    dropped: int = 0
    waiting_bytes: int = 0


class Writer:
    """Makes masks and puts them into a store, in the background.

    Args:
        store: any thread may put masks into it.
        url: of the store.
        mailbox: where handles go.
        most_bytes: of rows that wait.
    """

    def __init__(self, store: Store, url: str, mailbox: Mailbox, *, most_bytes: int = MOST_BYTES) -> None:
        self._store = store
        self._url = url
        self._mailbox = mailbox
        self._most_bytes = most_bytes
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._underway: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self.counts = WriteCounts()
        # Daemons: a store that never answers may not keep the process.
        self._threads = [
            threading.Thread(target=self._work, name=f"router-capture-writer-{number}", daemon=True)
            for number in range(_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, make: Callable[[], RoutingMasks], num_bytes: int) -> dict[str, Any]:
        """Store the masks that `make` makes.

        Args:
            make: called on another thread.
            num_bytes: of the rows that it holds.

        Returns:
            A ticket for the handle, or what stands in the place of a handle where there are no masks.
        """
        with self._lock:
            waiting = self.counts.waiting_bytes
            # What is larger than all that may wait goes when nothing does.
            too_much = waiting > 0 and waiting + num_bytes > self._most_bytes
            if too_much:
                self.counts.dropped += 1
            else:
                self.counts.waiting_bytes += num_bytes
        if too_much:
            reason = f"the store is behind: rows of {waiting:,} bytes wait for it, at most {self._most_bytes:,} may"
            self._tell_once("behind", reason)
            return no_masks(self._url, reason)
        ticket = new_ticket()
        self._jobs.put((ticket, make, num_bytes))
        return ticket

    def close(self) -> None:
        """Store what waits, for some seconds; the answers that wait for the rest are told that the server stopped."""
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + _CLOSING_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            left = list(self._underway.values())
        with contextlib.suppress(queue.Empty):
            while True:
                if (job := self._jobs.get_nowait()) is not None:
                    left.append(job[0])
        for ticket in left:
            self._post(ticket, no_masks(self._url, _STOPPED))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            ticket, make, num_bytes = job
            with self._lock:
                self._underway[threading.get_ident()] = ticket
            try:
                handle = self._store.put(make())
                stored = True
            except Exception as error:
                # Stores raise errors of their libraries, too; the request whose masks these are is to hear of it.
                reason = f"the store did not take them: {type(error).__name__}: {error}"
                self._tell_once(type(error).__name__, reason)
                handle, stored = no_masks(self._url, reason), False
            with self._lock:
                self.counts.waiting_bytes -= num_bytes
                self.counts.stored += stored
                self.counts.failed += not stored
            self._post(ticket, handle)
            with self._lock:
                del self._underway[threading.get_ident()]

    def _post(self, ticket: dict[str, Any], handle: dict[str, Any]) -> None:
        try:
            self._mailbox.post(ticket, handle)
        except OSError as error:
            # Masks that travel in their handle are large, and memory may be full where a name still fits.
            self._tell_once("mailbox", f"their handle cannot be handed on: {error}")
            self._mailbox.post_nothing(ticket)

    def _tell_once(self, kind: str, reason: str) -> None:
        with self._lock:
            if kind in self._told:
                return
            self._told.add(kind)
        logger.error(
            "router capture: masks of a request were not stored, and its answer says so: %s. Further ones like it are"
            " counted in the server's status and not reported.",
            reason,
        )
