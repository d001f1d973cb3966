"""Some of a run's tokens, to be drawn: a uniform sample, and those on which both sides differ most."""

from __future__ import annotations

import torch
from torch import Tensor


class TokenSample:
    """Of a stream of tokens, each with the rollout's log-probability and log r of its ratio trainer / rollout.

    The same stream in the same batches gives the same sample.

    Args:
        size: tokens in the uniform sample, or fewer where there are fewer.
        num_extremes: tokens with the largest abs(log r), at most, and at most one of a hundred.

    Attributes:
        total: tokens that were seen.
    """

    def __init__(self, size: int = 20_000, num_extremes: int = 200) -> None:
        self._size, self._num_extremes = size, num_extremes
        self._generator = torch.Generator().manual_seed(0)
        # Columns: the rollout's log-probability, log r, and what the choice goes by.
        self._sample = self._extremes = torch.empty(0, 3, dtype=torch.float64)
        self.total = 0

    def add(self, rollout: Tensor, log_ratio: Tensor) -> None:
        """Add n tokens; float `[n]` each, log r is -inf where the trainer's probability is 0."""
        draw = torch.rand(len(rollout), generator=self._generator, dtype=torch.float64)
        columns = torch.stack([rollout.double(), log_ratio.double(), draw], 1)
        self._sample = _largest(torch.cat([self._sample, columns]), self._size)
        columns[:, 2] = log_ratio.abs()
        self._extremes = _largest(torch.cat([self._extremes, columns]), self._num_extremes)
        self.total += len(rollout)

    @property
    def points(self) -> Tensor:
        """The uniform sample: float64 `[m, 2]`, the rollout's log-probability and log r."""
        return self._sample[:, :2]

    @property
    def extremes(self) -> Tensor:
        """The tokens of the largest abs(log r), largest first: as `points`."""
        # Of a few tokens, a ring around each would say nothing.
        return self._extremes[: self.total // 100 + 1, :2]


def _largest(columns: Tensor, count: int) -> Tensor:
    return columns[columns[:, 2].argsort(descending=True, stable=True)[:count]]
