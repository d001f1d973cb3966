"""Warnings for which there is cause in every microbatch, or every sample, and which are told now and then."""

from __future__ import annotations

import time

_SECONDS = 600.0


class Seldom:
    """Says when such a warning is due: the first time, and ten minutes after it was due at the earliest."""

    def __init__(self) -> None:
        self._last = -_SECONDS

    def due(self) -> bool:
        """Whether to warn now; true makes the next ten minutes quiet."""
        now = time.monotonic()
        if now - self._last < _SECONDS:
            return False
        self._last = now
        return True
