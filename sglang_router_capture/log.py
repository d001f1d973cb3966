"""The log: what happens to slots, in the order in which the scheduler issued it, passes in flight included."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_IN_FLIGHT = 32


@dataclass
class Event:
    """Something that happens to slots.

    Attributes:
        apply: called with `tensors`, then on the host, when everything before it has been applied.
        tensors: which slots, and what else has to come from the device.
    """

    apply: Callable[..., None]
    tensors: tuple[Tensor, ...]

    def map_device_tensors(self, copy: Callable[[Tensor], Tensor]) -> None:
        """Replace the tensors that are on a device by what `copy` makes of them.

        With confidential computing a thread of SGLang's own calls this, with a `copy` that blocks
        (`async_d2h_copy_worker`): whoever reads `tensors` meanwhile gets the device's or whole copies.
        """
        self.tensors = tuple(copy(tensor) if tensor.device.type != "cpu" else tensor for tensor in self.tensors)

    def run(self) -> None:
        """Call `apply`, on the host."""
        self.apply(*(tensor.cpu() for tensor in self.tensors))


@dataclass
class PassRecord:
    """What one forward pass tells the tables, and what happened since the pass before, on the way to the host.

    Upstream treats it as it treats `TopkCaptureOutput`: `map_device_tensors` copies it with the step's own result,
    `finalize` runs once that copy is done.

    Attributes:
        log: the one that it stands in.
        events: in their order; the pass itself is the last of them.
        settled: they have all been applied.
    """

    log: Log
    events: list[Event]
    settled: bool = False

    def map_device_tensors(self, copy: Callable[[Tensor], Tensor]) -> None:
        """Replace the device tensors by what `copy` makes of them."""
        for event in self.events:
            event.map_device_tensors(copy)

    def finalize(self) -> None:
        """Put the pass, and every earlier one whose result was dropped, into the slot table."""
        self.log.settle(self)

    def run(self) -> None:
        """Apply the events, each in its turn."""
        for event in self.events:
            event.run()
        self.settled = True


class Log:
    """One sequence of events and passes, applied in its order.

    Slots change hands while passes are in flight: with the overlap schedule the extra step of a finished request ends
    after its slot has been given away. Whatever happens to a slot, on the device or on the host, therefore stands in
    the log, and nothing reads or writes a table but through it and after it: nobody's late write survives the
    allocation that follows it.

    The scheduler thread launches and settles. Events may come from other threads, too: what a thread of SGLang's
    does to host slots is ordered by how that thread was told to, and told of, its work.
    """

    def __init__(self, device: str) -> None:
        self._on_cuda = device == "cuda"
        self._pending: list[Event] = []
        self._in_flight: deque[PassRecord] = deque()
        self._lock = threading.Lock()

    def append(self, apply: Callable[..., None], *tensors: Tensor) -> None:
        """Something happens to slots now.

        Args:
            apply: a table's method, or a function of the same tensors on the host, that runs in its turn, on the
                scheduler thread. Of one tensor, it may get those of several events in a row as one.
            tensors: on any device; copied, since their owner may reuse them.
        """
        event = Event(apply, tuple(tensor.detach().clone() for tensor in tensors))
        with self._lock:
            self._pending.append(event)

    def launch(self, apply: Callable[..., None], *tensors: Tensor) -> PassRecord:
        """A forward pass was launched, on the current stream, after all that is in the log.

        Args:
            apply: as of `append`.
            tensors: what the pass wrote; nobody else may change them.
        """
        record = PassRecord(self, [*self._taken(), Event(apply, tensors)])
        self._in_flight.append(record)
        if len(self._in_flight) > _MOST_IN_FLIGHT:
            # Nobody asks for their results.
            self.wait()
            self.settle(self._in_flight[0])
        return record

    def settle(self, record: PassRecord) -> None:
        """Apply everything up to and including `record`."""
        while not record.settled:
            self._in_flight.popleft().run()

    def settle_all(self) -> None:
        """Apply everything that is in the log, and wait for the passes in flight. For when no batch runs."""
        if self._in_flight:
            self.wait()
            self.settle(self._in_flight[-1])
        for event in self._taken():
            event.run()

    def settle_what_is_ready(self) -> None:
        """Apply everything that is in the log, if no pass is in flight: nothing has to be waited for."""
        if not self._in_flight:
            self.settle_all()

    def clear(self) -> None:
        """Forget all of it."""
        self._in_flight.clear()
        self._taken()

    def __len__(self) -> int:
        """Number of passes and events that are not applied yet."""
        return len(self._pending) + sum(len(record.events) for record in self._in_flight)

    def wait(self) -> None:
        """Wait for the device, where the passes in flight and the copies of what they wrote are computed."""
        # On all streams: SGLang copies on one of its own.
        if self._on_cuda:
            torch.cuda.synchronize()

    def _taken(self) -> list[Event]:
        with self._lock:
            taken, self._pending = self._pending, []
        for event in taken:
            for tensor in event.tensors:
                # Made on the scheduler's stream and read on the forward's: the memory must not be reused in between.
                if tensor.is_cuda:
                    tensor.record_stream(torch.cuda.current_stream())
        return _merged(taken)


def _merged(events: list[Event]) -> list[Event]:
    """Allocations come by the dozen, and each would be a copy of its own from the device."""
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.apply == event.apply
            and len(last.tensors) == len(event.tensors) == 1
            and last.tensors[0].device == event.tensors[0].device
        ):
            last.tensors = (torch.cat([*last.tensors, *event.tensors]),)
        else:
            merged.append(event)
    return merged
