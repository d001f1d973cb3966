"""Which weights the server had when, under which names."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field


@dataclass
class _Update:
    name: str | None
    checkpoint: int
    begun: float
    done: float = float("inf")


@dataclass
class WeightHistory:
    """Updates in their order; one at a time.

    Attributes:
        checkpoints: number of the checkpoint behind each name that is known.
    """

    first_name: str = "default"
    checkpoints: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._updates = [_Update(self.first_name, 0, 0.0, 0.0)]
        self.checkpoints[self.first_name] = 0

    @property
    def current(self) -> int:
        """The checkpoint whose weights the server has, once the last update is done."""
        return self._updates[-1].checkpoint

    def begin(self, name: str | None, checkpoint: int) -> None:
        """An update to `checkpoint` is about to be sent, without a name or with one."""
        with self._lock:
            self._updates.append(_Update(name, checkpoint, time.monotonic()))
            if name is not None:
                self.checkpoints[name] = checkpoint

    def done(self) -> None:
        """The update is made, whatever the server said."""
        with self._lock:
            self._updates[-1].done = time.monotonic()

    def failed(self) -> None:
        """The last update was refused and changed nothing."""
        with self._lock:
            self._updates.pop()

    def unnamed(self) -> set[int]:
        """Checkpoints of the updates that had no name."""
        with self._lock:
            return {update.checkpoint for update in self._updates if update.name is None}

    def given(self, name: str) -> bool:
        """Whether `name` is one of ours."""
        with self._lock:
            return any(update.name == name for update in self._updates)

    def in_force(self, name: str, first: float, last: float) -> bool:
        """Whether `name`, given by us, may have been the server's at some time in [first, last]."""
        with self._lock:
            ends = [update.done for update in self._updates[1:]] + [float("inf")]
            return any(
                update.name == name and update.begun <= last and end >= first
                for update, end in zip(self._updates, ends, strict=True)
            )
