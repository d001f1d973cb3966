"""Items of a flat tensor in segments, and the rectangle that has a row for each segment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Items of a flat tensor that belong to segments, such as tokens to sequences, and sequences to prompts.

    Attributes:
        segment: int64 `[n]`, the segment of each item.
        offset: int64 `[n]`, the number of each item in its segment; no two items of a segment share one.
        counts: int64 `[num_segments]`, items of each segment.
        width: the largest count, which is the width of a rectangle of one row a segment.
    """

    segment: Tensor
    offset: Tensor
    counts: Tensor
    width: int

    @property
    def num_segments(self) -> int:
        """Number of segments, empty ones included."""
        return len(self.counts)

    @classmethod
    def of(cls, segment: Tensor, num_segments: int) -> Segments:
        """Items of the segments `segment`, int64 `[n]`, with offsets by the order in which they come."""
        counts = torch.bincount(segment, minlength=num_segments)
        order = torch.argsort(segment, stable=True)
        begins = counts.cumsum(0) - counts
        offset = torch.empty_like(segment)
        offset[order] = torch.arange(len(segment), device=segment.device) - begins[segment[order]]
        return cls(segment, offset, counts, int(counts.max()) if num_segments else 0)

    def spread(self, items: Tensor, fill: float = 0.0) -> Tensor:
        """`[n]` to `[num_segments, width]`, `fill` where there is no item; gradients flow back."""
        rectangle = torch.full((self.num_segments, self.width), fill, dtype=items.dtype, device=items.device)
        return rectangle.index_put((self.segment, self.offset), items)

    def gather(self, rectangle: Tensor) -> Tensor:
        """`[num_segments, width]` back to `[n]`."""
        return rectangle[self.segment, self.offset]
