"""Items of a flat tensor in segments: sums and maxima of each, and recurrences along them, in O(n).

Items in another order than their segments' are sorted once, in O(n log n).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Items of a flat tensor that belong to segments, such as tokens to sequences, and sequences to prompts.

    Nothing here waits for the device, and there is no rectangle of one row for each segment: one long segment among
    many short ones costs what its items cost.

    Attributes:
        segment: int64 `[n]`, the segment of each item.
        counts: int64 `[num_segments]`, items of each segment.
        order: int64 `[n]`, the items so that segments follow each other, each in the order of its items; None where
            they do as they are.
    """

    segment: Tensor
    counts: Tensor
    order: Tensor | None = None

    @property
    def num_segments(self) -> int:
        """Number of segments, empty ones included."""
        return len(self.counts)

    @classmethod
    def of(cls, segment: Tensor, num_segments: int) -> Segments:
        """Items of the segments `segment`, int64 `[n]`, in any order."""
        counts = torch.zeros(num_segments, dtype=torch.int64, device=segment.device)
        counts.index_add_(0, segment, torch.ones_like(segment))
        return cls(segment, counts, segment.argsort(stable=True))

    @classmethod
    def following(cls, counts: Sequence[int], device: torch.device) -> Segments:
        """Items of segments that follow each other."""
        number = torch.tensor(counts, dtype=torch.int64)
        return cls(torch.repeat_interleave(number).to(device), number.to(device))

    def to(self, device: torch.device) -> Segments:
        """The same on another device."""
        order = None if self.order is None else self.order.to(device)
        return Segments(self.segment.to(device), self.counts.to(device), order)

    def sum(self, items: Tensor) -> Tensor:
        """Sum of each segment: `[n]` to `[num_segments]`, 0 for an empty one; gradients flow back.

        In float64 and in one order, on any device: ranks that hold the same items get the same bits.
        """
        return self._reduce(items.double(), "sum", 0.0).to(items.dtype)

    def max(self, items: Tensor) -> Tensor:
        """Maximum of each segment: `[n]` to `[num_segments]`, -inf for an empty one."""
        return self._reduce(items, "max", -torch.inf)

    def of_items(self, values: Tensor) -> Tensor:
        """Each item's value of its segment: `[num_segments]` to `[n]`; gradients flow back."""
        return values.index_select(0, self.segment)

    def running_sum(self, items: Tensor, *, reverse: bool = False) -> Tensor:
        """Sum over the items of the segment up to each one (`reverse`: from it on), float64 `[n]`.

        As of `recurrence`, with factors of 1.
        """
        return self.recurrence(torch.ones_like(items, dtype=torch.float64), items, reverse=reverse)

    def recurrence(self, factors: Tensor, terms: Tensor, *, reverse: bool = False) -> Tensor:
        """Numbers x_t = factors_t x_(t-1) + terms_t along each segment (`reverse`: x_(t+1)), from 0, float64 `[n]`.

        Segments must follow each other. Items of one do not reach another, NaN and infinity included. Rounding is that
        of the loop over t: an error of at most some n eps times the sum of the terms' magnitudes, each multiplied by
        the factors on its way. Products of factors may overflow that the loop would not meet one after the other.
        """
        factors, terms = factors.double().masked_fill(self._at_edge(last=reverse), 0), terms.double()
        if reverse:
            return _linear_scan(factors.flip(0), terms.flip(0)).flip(0)
        return _linear_scan(factors, terms)

    def next_of(self, items: Tensor) -> Tensor:
        """The item after each one in its segment, 0 after the last; segments must follow each other."""
        return torch.cat([items[1:], items.new_zeros(min(1, len(items)))]).masked_fill(self._at_edge(last=True), 0)

    def _at_edge(self, *, last: bool) -> Tensor:
        """Where an item is the first, or the last, of its segment."""
        edge = torch.ones(min(1, len(self.segment)), dtype=torch.bool, device=self.segment.device)
        change = self.segment[1:] != self.segment[:-1]
        return torch.cat([change, edge] if last else [edge, change])

    def _reduce(self, items: Tensor, reduction: str, initial: float) -> Tensor:
        items = items if self.order is None else items.index_select(0, self.order)
        # Counts that sum to the number of items are what `unsafe` leaves unchecked, for a transfer from the device.
        return torch.segment_reduce(items, reduction, lengths=self.counts, unsafe=True, initial=initial)


def _linear_scan(factors: Tensor, terms: Tensor) -> Tensor:
    """x_t = factors_t x_(t-1) + terms_t, x_(-1) = 0, all `[n]`: 2 n compositions of pairs in 2 log2(n) steps."""
    pairs = len(terms) // 2
    if pairs == 0:
        return terms
    first, second = factors[: 2 * pairs : 2], factors[1::2]
    ends = _linear_scan(_times(second, first), _times(second, terms[: 2 * pairs : 2]) + terms[1::2])
    found = terms.clone()
    found[1::2] = ends
    found[2::2] += _times(factors[2::2], ends[: len(terms[2::2])])
    return found


def _times(factors: Tensor, values: Tensor) -> Tensor:
    """The product, 0 where one is: a factor of 0 forgets whatever was before, and products overflow unused."""
    return (factors * values).masked_fill((factors == 0) | (values == 0), 0)
