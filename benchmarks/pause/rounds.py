"""One round with one server: ends of long requests with and without routes, while short ones arrive."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.interleaved import Seconds
from benchmarks.pause.load import LongRequests, ShortRequests
from benchmarks.pause.servers import Measured, Sizes

QUIET, WITHOUT, WITH, AGAIN = "no long request", "without routes", "with routes", "without, again"
PHASES = (QUIET, WITHOUT, WITH, AGAIN)

_LINE_S = 10.0


@dataclass(frozen=True)
class Pause:
    """What a scheduler's thread did for long requests that ended.

    Attributes:
        requests: how many.
        steps: of the scheduler, in which they ended.
        seconds: from taking their routes to having sent the answers of their batches.
    """

    requests: int
    steps: int
    seconds: Seconds

    @classmethod
    def of(cls, lines: list[dict[str, Any]]) -> Pause:
        """Of the lines that `router_capture_pause.measure` wrote in which long requests ended; others do not count."""
        ends = [line for line in lines if line["ended"]]
        parts = [part for line in ends for part in (*line["collected"], line["sent"])]
        seconds = Seconds(sum(wall for wall, _ in parts), sum(cpu for _, cpu in parts))
        return cls(sum(line["ended"] for line in ends), len(ends), seconds)


@dataclass
class Round:
    """What one round measured.

    Attributes:
        single: pauses of requests that ended alone, by whether they asked for routes.
        together: pauses of those that ended together, likewise.
        first_tokens: seconds until short requests' first tokens, by phase.
        table: most seconds that changes of the slot table took in a step after an end with routes, and after one
            without.
    """

    single: dict[bool, list[Pause]] = field(default_factory=lambda: {True: [], False: []})
    together: dict[bool, Pause] = field(default_factory=dict)
    first_tokens: dict[str, list[float]] = field(default_factory=dict)
    table: dict[bool, float] = field(default_factory=dict)

    def median_first_token(self, phase: str) -> float:
        """Median seconds until a first token."""
        return statistics.median(self.first_tokens[phase])


def one_round(measured: Measured, longs: LongRequests, sizes: Sizes) -> Round:
    """Every phase once, and the single requests.

    Raises:
        RuntimeError: a request was not answered as it should.
    """
    found = Round()
    shorts = ShortRequests(measured, sizes.interval)
    with shorts.arriving():
        since = time.monotonic()
        time.sleep(sizes.window)
        found.first_tokens[QUIET] = shorts.first_tokens(since, since + sizes.window)
        for phase in (WITHOUT, WITH, AGAIN):
            with_routes = phase == WITH
            since = time.monotonic()
            answered = longs.end(sizes.together, with_routes=with_routes)
            ended = max(line["at"] for line in _lines_of_ends(measured, since, sizes.together))
            # Checked later: there are few cores.
            time.sleep(max(0.0, ended + sizes.window - time.monotonic()))
            lines = measured.lines(since)
            found.together[with_routes] = Pause.of(lines)
            found.table[with_routes] = max(line["table"][0] for line in lines if line["at"] >= ended)
            longs.check(answered, with_routes=with_routes)
            # Those that were asked last may still wait.
            time.sleep(1.0)
            found.first_tokens[phase] = shorts.first_tokens(ended, ended + sizes.window)
        for _ in range(sizes.single):
            for with_routes in (True, False):
                since = time.monotonic()
                answered = longs.end(1, with_routes=with_routes)
                found.single[with_routes].append(Pause.of(_lines_of_ends(measured, since, 1)))
                longs.check(answered, with_routes=with_routes)
    return found


def _lines_of_ends(measured: Measured, since: float, number: int) -> list[dict[str, Any]]:
    deadline = time.monotonic() + _LINE_S
    while time.monotonic() < deadline:
        lines = [line for line in measured.lines(since) if line["ended"]]
        if sum(line["ended"] for line in lines) == number:
            return lines
        # An answer may be here before the line about it.
        time.sleep(0.05)
    raise RuntimeError(f"{number} requests were answered, but the scheduler's records do not say so: {lines}")
