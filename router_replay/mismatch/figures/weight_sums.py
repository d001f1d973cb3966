"""Sums of importance weights and of their squares, from which means and effective sample sizes follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class WeightSums:
    """Sums of w and of w^2, of weights known by their logarithms, relative to the largest: nothing over- or underflows.

    Attributes:
        highest: float64 `[1]`, the largest log w; -inf if there is none above 0.
        sums: float64 `[2]`: sum exp(log w - highest) and sum exp(2 (log w - highest)).
    """

    highest: Tensor
    sums: Tensor

    @classmethod
    def of(cls, log_weights: Tensor) -> WeightSums:
        """Of float64 `[n]`; -inf is a weight of 0."""
        # The item that is appended stands for no weight at all.
        highest = torch.cat([log_weights, log_weights.new_full((1,), -torch.inf)]).max()[None]
        scaled = (log_weights - _finite(highest)).exp()
        return cls(highest, torch.stack([scaled.sum(), scaled.square().sum()]))

    def relative_to(self, highest: Tensor) -> Tensor:
        """The sums as they are relative to another, larger, log w."""
        factor = (self.highest - _finite(highest)).exp()
        return self.sums * torch.cat([factor, factor.square()])

    def __add__(self, other: WeightSums) -> WeightSums:
        """Both batches'."""
        highest = torch.maximum(self.highest, other.highest)
        return WeightSums(highest, self.relative_to(highest) + other.relative_to(highest))

    @property
    def largest(self) -> Tensor:
        """The largest w, float64 0-d, 0 if there is none above 0."""
        return self.highest[0].exp()

    @property
    def total(self) -> Tensor:
        """Sum of w, float64 0-d."""
        return self.largest * self.sums[0]

    def effective_share(self, count: int | Tensor) -> Tensor:
        """Effective sample size over `count`, (sum w)^2 / (count * sum w^2), float64 0-d; 0 if every weight is 0."""
        first, second = self.sums.unbind()
        none = second == 0
        return (first.square() / (count * second).masked_fill(none, 1)).masked_fill(none, 0)


def _finite(highest: Tensor) -> Tensor:
    return highest.masked_fill(highest == -torch.inf, 0)
