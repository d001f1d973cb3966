"""Which passes are compared, with the trainer's own choice and between ranks."""

from __future__ import annotations

from collections.abc import Iterable

from router_replay.replay.overlap import OverlapSample


class Comparisons:
    """When to compare: in training until every layer was judged, and in every so many passes.

    Args:
        every: number of passes; None never compares.
        layers: decoder layers with a router on this rank.
        num_chunks: model chunks on this rank, each of which takes passes of its own.
    """

    def __init__(self, every: int | None, layers: Iterable[int], num_chunks: int) -> None:
        self._every = every
        self._not_judged = set(layers)
        self._num_chunks = num_chunks
        self._num_passes = 0
        self._num_training_passes = 0

    def next(self, training: bool) -> tuple[OverlapSample | None, bool]:
        """For the next pass over a microbatch: where to compare with the own choice, and whether with other ranks.

        The latter is a collective, so nothing that may differ between ranks decides about it.
        """
        if self._every is None:
            return None, False
        regular = self._num_passes % self._every == 0
        between_ranks = regular or (training and self._num_training_passes < self._num_chunks)
        sampled = regular or (training and bool(self._not_judged))
        self._num_passes += 1
        self._num_training_passes += training
        return OverlapSample() if sampled else None, between_ranks

    def judged(self, layers: Iterable[int]) -> None:
        """Enough places of a training pass through these layers were compared."""
        self._not_judged -= set(layers)
