"""What is left of a batch under importance weights: their histogram and effective sample size, added up over steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from router_replay.mismatch.figures.weight_sums import WeightSums

LADDER = (1.002, 1.005, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 5.0, 10.0, 100.0)
"""Ratios r of a histogram that goes from 1/r to r, from which the smallest that fits is drawn."""

_CELL = math.log(LADDER[0]) / 20
_HALF = math.ceil(math.log(LADDER[-1]) / _CELL)


@dataclass
class WeightFigures:
    """Of the response tokens' weights; they change as `add` is called.

    Attributes:
        tokens: response tokens, those with weight 0 included.
        kept: those with a weight above 0.
        cells: int64, numbers of tokens with a weight around exp(i * cell), i from -half to half; the outermost cells
            hold what lies beyond them, and weights of 0 are in none.
        sums: of which the effective sample size follows.
        lowest: (share, step): the lowest effective sample size of a step.
    """

    tokens: int = 0
    kept: int = 0
    cells: Tensor = field(default_factory=lambda: torch.zeros(2 * _HALF + 1, dtype=torch.int64))
    sums: WeightSums = field(default_factory=lambda: WeightSums.of(torch.empty(0, dtype=torch.float64)))
    lowest: tuple[float, int] = (1.0, -1)

    def add(self, weights: Tensor, step: int) -> None:
        """Add the weights `[n]` of a step's n > 0 response tokens; finite, none below 0."""
        logs = weights.double().log()
        positive = logs[logs > -torch.inf]
        cell = (positive / _CELL).round().clamp(-_HALF, _HALF).long() + _HALF
        self.cells.index_add_(0, cell, torch.ones_like(cell))
        self.tokens += len(weights)
        self.kept += len(positive)
        sums = WeightSums.of(logs)
        self.sums = self.sums + sums
        share = float(sums.effective_share(len(weights)))
        if self.lowest[1] < 0 or share < self.lowest[0]:
            self.lowest = (share, step)

    @property
    def effective_share(self) -> float:
        """Share (sum w)^2 / (tokens * sum w^2) of all response tokens that is effective; 0 if every weight is 0."""
        return float(self.sums.effective_share(self.tokens))

    @property
    def reach(self) -> float:
        """The smallest ratio of `LADDER` for which the histogram holds all weights; the largest if none does."""
        used = (self.cells.nonzero() - _HALF).abs()
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
        position = torch.arange(-_HALF, _HALF + 1, dtype=torch.float64).clamp(-half, half)
        bar = ((position + half) / (2 * half) * (bars - 1)).round().long()
        counts = torch.zeros(bars, dtype=torch.int64).index_add_(0, bar, self.cells)
        width = 2 * half * _CELL / (bars - 1)
        edges = (torch.arange(bars + 1, dtype=torch.float64) - bars / 2) * width
        return edges, counts.double() / max(self.tokens, 1)


def _cells(ratio: float) -> int:
    return max(1, round(math.log(ratio) / _CELL))
