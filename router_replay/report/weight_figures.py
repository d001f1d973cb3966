"""What is left of a run's batches under importance weights: their histogram and effective sample size."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from router_replay.run.weight_tally import CELL, FARTHEST, FINEST, HALF, WeightTally

LADDER = (FINEST, 1.005, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 5.0, 10.0, FARTHEST)
"""Ratios r of a histogram that goes from 1/r to r, from which the smallest that fits is drawn."""


@dataclass
class WeightFigures:
    """Of the response tokens' weights in all steps; they change as `add` is called.

    Attributes:
        total: of all steps.
        lowest: (share, step): the lowest effective sample size of a step.
    """

    total: WeightTally = field(default_factory=lambda: WeightTally.of(torch.empty(0)))
    lowest: tuple[float, int] = (1.0, -1)

    def add(self, tally: WeightTally, step: int) -> None:
        """Add the weights of a whole step."""
        self.total = self.total + tally
        share = tally.effective_share
        if self.lowest[1] < 0 or share < self.lowest[0]:
            self.lowest = (share, step)

    @property
    def kept_share(self) -> float:
        """Share of response tokens with a weight above 0."""
        return self.total.kept / self.total.tokens

    @property
    def reach(self) -> float:
        """The smallest ratio of `LADDER` for which the histogram holds all weights; the largest if none does."""
        used = (self.total.cells.nonzero() - HALF).abs()
        farthest = int(used.max()) if len(used) else 0
        # The outermost cell also has what lies beyond.
        return next((ratio for ratio in LADDER[:-1] if _cells(ratio) >= farthest), LADDER[-1])

    def histogram(self, reach: float, bars: int = 41) -> tuple[Tensor, Tensor]:
        """Shares of tokens by weight, from 1/reach to reach.

        Returns:
            Edges `[bars + 1]` as natural logarithms of the weights, and shares of all tokens `[bars]`, which with
            the share of weight 0 add up to 1; the outermost bars hold what lies beyond.
        """
        half = _cells(reach)
        position = torch.arange(-HALF, HALF + 1, dtype=torch.float64).clamp(-half, half)
        bar = ((position + half) / (2 * half) * (bars - 1)).round().long()
        counts = torch.zeros(bars, dtype=torch.int64).index_add_(0, bar, self.total.cells)
        width = 2 * half * CELL / (bars - 1)
        edges = (torch.arange(bars + 1, dtype=torch.float64) - bars / 2) * width
        return edges, counts.double() / max(self.total.tokens, 1)


def _cells(ratio: float) -> int:
    return max(1, round(math.log(ratio) / CELL))
