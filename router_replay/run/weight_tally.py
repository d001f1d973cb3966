"""What is kept of importance weights: numbers from which their histogram and effective sample size follow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from router_replay.mismatch.figures.weight_sums import WeightSums

FINEST, FARTHEST = 1.002, 100.0
"""Ratios r of the narrowest and the widest histogram that is drawn, from 1/r to r."""

CELL = math.log(FINEST) / 20
"""Width of a cell, in natural logarithms of a weight."""

HALF = math.ceil(math.log(FARTHEST) / CELL)
"""Cells on either side of that of weight 1."""


@dataclass(frozen=True, eq=False)
class WeightTally:
    """Of the weights of n response tokens; those of two batches add up to those of both.

    Attributes:
        tokens: response tokens, those with weight 0 included.
        kept: those with a weight above 0.
        cells: int64 `[2 HALF + 1]`, numbers of tokens with a weight around exp(i CELL), i from -HALF to HALF; the
            outermost cells hold what lies beyond them, and weights of 0 are in none.
        sums: of which the effective sample size follows.
    """

    tokens: int
    kept: int
    cells: Tensor
    sums: WeightSums

    @classmethod
    def of(cls, weights: Tensor) -> WeightTally:
        """Of `[n]` weights; finite, none below 0."""
        logs = weights.double().log()
        positive = logs[logs > -torch.inf]
        cell = (positive / CELL).round().clamp(-HALF, HALF).long() + HALF
        return cls(len(weights), len(positive), torch.bincount(cell, minlength=2 * HALF + 1), WeightSums.of(logs))

    def __add__(self, other: WeightTally) -> WeightTally:
        """Both batches'."""
        return WeightTally(
            self.tokens + other.tokens, self.kept + other.kept, self.cells + other.cells, self.sums + other.sums
        )

    @property
    def effective_share(self) -> float:
        """Share (sum w)^2 / (tokens * sum w^2) of all response tokens that is effective; 0 if every weight is 0."""
        return float(self.sums.effective_share(self.tokens))
