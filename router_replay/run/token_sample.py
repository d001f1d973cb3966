"""Some of a run's tokens, to be drawn: a uniform sample, and those on which both sides differ most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SIZE_OF_STEP, SIZE_OF_RUN = 4096, 20_000
"""Tokens of a step that are kept beside its tallies, and of a run, to be drawn."""

_EXTREMES = 200


@dataclass(frozen=True, eq=False)
class TokenSample:
    """Of tokens, each with the rollout's log-probability and log r of its ratio trainer / rollout; samples add up.

    Every token draws a number, and those with the largest are the sample. Of a sum these are the ones above the
    threshold of every part, since below it some part has not kept its own.

    Attributes:
        total: tokens that there are.
        drawn: float64 `[m, 3]`, the rollout's log-probability, log r and the number drawn of the sample's tokens.
        threshold: every token that drew more than this is in `drawn`; 0 where all are.
        largest: float64 `[k, 2]`, the rollout's log-probability and log r of the tokens with the largest abs(log r).
    """

    total: int
    drawn: Tensor
    threshold: float
    largest: Tensor

    @classmethod
    def of(cls, rollout: Tensor, log_ratio: Tensor, *, seed: int, size: int = SIZE_OF_STEP) -> TokenSample:
        """Of n tokens; float `[n]` each, log r is -inf where the trainer's probability is 0.

        Args:
            seed: another one for each batch of tokens; the same one draws the same tokens.
            size: tokens in the sample, or fewer where there are fewer.
        """
        draw = torch.rand(len(rollout), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        columns = torch.stack([rollout.double(), log_ratio.double(), draw], 1)
        return cls._of(len(rollout), columns, 0.0, columns[:, :2], size)

    def __add__(self, other: TokenSample) -> TokenSample:
        """Both batches'."""
        threshold = max(self.threshold, other.threshold)
        drawn = torch.cat([self.drawn, other.drawn])
        largest = torch.cat([self.largest, other.largest])
        return self._of(self.total + other.total, drawn[drawn[:, 2] >= threshold], threshold, largest, SIZE_OF_RUN)

    @classmethod
    def _of(cls, total: int, drawn: Tensor, threshold: float, largest: Tensor, size: int) -> TokenSample:
        if len(drawn) > size:
            drawn = _with_largest(drawn, drawn[:, 2], size)
            threshold = float(drawn[-1, 2])
        return cls(total, drawn, threshold, _with_largest(largest, largest[:, 1].abs(), _EXTREMES))

    @property
    def points(self) -> Tensor:
        """The uniform sample: float64 `[m, 2]`, the rollout's log-probability and log r."""
        return self.drawn[:, :2]

    @property
    def extremes(self) -> Tensor:
        """The tokens of the largest abs(log r), at most one of a hundred, largest first: as `points`."""
        # Of a few tokens, a ring around each would say nothing.
        return self.largest[: self.total // 100 + 1]


def _with_largest(columns: Tensor, key: Tensor, count: int) -> Tensor:
    # Not sorted as a whole: of millions of tokens that takes seconds.
    return columns[key.topk(min(count, len(key))).indices]
