"""How many rows of its rollout a server did not know: verl's trainer routes these by itself, and says nothing of it."""

from __future__ import annotations

import logging

from torch import Tensor

from router_replay_adapters.seldom import Seldom

logger = logging.getLogger(__name__)


class UnknownRows:
    """Counts rows of samples since the last line of the log, which comes where some of them are unknown."""

    def __init__(self) -> None:
        self._warning = Seldom()
        self._samples = self._rows = self._unknown = 0

    def add(self, routes: Tensor) -> None:
        """Count one sample's rows, `int [rows, L, K]`, as they came from the server."""
        self._samples += 1
        self._rows += len(routes)
        self._unknown += int((routes < 0).flatten(1).any(1).sum())
        if self._unknown and self._warning.due():
            logger.warning(
                "%d of the %d rows of the last %d samples of verl (%.1f %%) are unknown to its servers: the trainer"
                " routes these tokens by itself",
                self._unknown,
                self._rows,
                self._samples,
                100 * self._unknown / self._rows,
            )
            self._samples = self._rows = self._unknown = 0
