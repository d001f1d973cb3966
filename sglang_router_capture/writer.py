"""Masks of finished requests are made and stored on threads of their own, and the scheduler does not wait for them."""

from __future__ import annotations

import logging
import math
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

# A store on another machine answers after some milliseconds, in which it can take the next request's masks.
_THREADS = 4
# Masks are made once no request has ended for so long, or after the longest: the scheduler notes requests that end in
# one step one after the other, and sends their answers, and would share Python's lock with who makes masks meanwhile.
_QUIET_S = 0.005
_LONGEST_S = 0.05
# SGLang gives a scheduler that is to stop a few seconds more than this.
_CLOSING_S = 5.0
_STOPPED = "the server stopped before the store had taken them"


@dataclass(frozen=True, eq=False)
class _Job:
    """A request whose masks are on their way: their rows' size, and the ticket of whose answer waits for them.

    Attributes:
        since: when the request ended, by `time.monotonic`.
    """

    ticket: dict[str, str]
    num_bytes: int
    make: Callable[[], RoutingMasks]
    since: float


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
        self._made: queue.SimpleQueue[tuple[_Job, RoutingMasks] | None] = queue.SimpleQueue()
        self._underway: set[_Job] = set()
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self._latest = -math.inf
        self.counts = WriteCounts()
        # One makes the masks, however long the store takes: until then their rows are in the slot table alone, and the
        # scheduler would have to copy them before it uses the slots again.
        # Daemons: a store that never answers may not keep the process.
        works = [self._make_next] + [self._store_next] * _THREADS
        self._threads = [
            threading.Thread(target=_repeat, args=(work,), name=f"router-capture-writer-{number}", daemon=True)
            for number, work in enumerate(works)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, make: Callable[[], RoutingMasks], num_bytes: int) -> dict[str, Any]:
        """Store the masks that `make` makes.

        Args:
            make: called on another thread.
            num_bytes: of the rows that it holds, and of what tells them: slots, token ids.

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
        job = _Job(new_ticket(), num_bytes, make, time.monotonic())
        self._latest = job.since
        with self._lock:
            self._underway.add(job)
        self._jobs.put(job)
        return job.ticket

    def close(self) -> None:
        """Store what waits, for some seconds; the answers that wait for the rest are told that the server stopped."""
        self._jobs.put(None)
        deadline = time.monotonic() + _CLOSING_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            left = list(self._underway)
        for job in left:
            self._post(job.ticket, no_masks(self._url, _STOPPED))

    # Each of these ends with what it worked on: a thread that waits for the next holds no rows.

    def _make_next(self) -> bool:
        job = self._jobs.get()
        if job is None:
            for _ in range(_THREADS):
                self._made.put(None)
            return False
        while (left := min(self._latest + _QUIET_S, job.since + _LONGEST_S) - time.monotonic()) > 0:
            time.sleep(left)
        try:
            masks = job.make()
        except Exception as error:
            # A machine without memory, for one.
            self._failed(job, "making", f"they could not be made: {type(error).__name__}: {error}")
        else:
            self._made.put((job, masks))
        return True

    def _store_next(self) -> bool:
        made = self._made.get()
        if made is None:
            return False
        job, masks = made
        try:
            handle = self._store.put(masks)
        except Exception as error:
            # Stores raise errors of their libraries, too; the request whose masks these are is to hear of it.
            kind = type(error).__name__
            self._failed(job, kind, f"the store did not take them: {kind}: {error}")
        else:
            self._end(job, handle, stored=True)
        return True

    def _failed(self, job: _Job, kind: str, reason: str) -> None:
        self._tell_once(kind, reason)
        self._end(job, no_masks(self._url, reason), stored=False)

    def _end(self, job: _Job, handle: dict[str, Any], *, stored: bool) -> None:
        with self._lock:
            self.counts.waiting_bytes -= job.num_bytes
            self.counts.stored += stored
            self.counts.failed += not stored
        self._post(job.ticket, handle)
        with self._lock:
            self._underway.remove(job)

    def _post(self, ticket: dict[str, Any], handle: dict[str, Any]) -> None:
        try:
            self._mailbox.post(ticket, handle)
        except Exception as error:
            # Masks that travel in their handle are large, and memory may be full where a name still fits; a handle or a
            # reason may hold what cannot be written. A thread that ended of it would leave all later answers waiting.
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


def _repeat(work: Callable[[], bool]) -> None:
    while work():
        pass
