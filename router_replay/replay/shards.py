"""Which places of a batch a rank sees under context and sequence parallelism."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.replay.layout import BatchLayout, require_layout

ContextOrder = Literal["zigzag", "contiguous"]
"""How context parallelism cuts. `zigzag` gives rank r of C the parts r and 2C - 1 - r of 2C: of every sequence of a
pack, of all steps of a padded batch. `contiguous` gives it the r-th of C parts: of the pack as a whole, wherever its
sequences end, or of all steps (`allgather_cp` in slime and miles, `cp_layout="contiguous"` in verl).
"""


@dataclass(frozen=True)
class Shards:
    """What part of a batch the routers of one rank see.

    Context parallelism cuts the batch before the model is called, sequence parallelism what the model was called with,
    into equal runs of the sequence dimension. Without sequence parallelism a tensor-parallel rank sees every place.

    Layouts of padded batches have their places step by step, as Megatron flattens `[S, B, H]`: place = s * B + b. A
    trainer that flattens `[B, S, H]` sees them sequence by sequence, place = b * S + s.

    Attributes:
        context_size: ranks that share a sequence.
        context_rank: this one among them.
        context_order: how they share it.
        sequence_size: ranks of sequence parallelism, which is tensor parallelism's size where it is on.
        sequence_rank: this one among them.
        batch_first: whether the routers see a padded batch sequence by sequence. Of places that are some of a batch
            already, whose layout says nothing of the model's call, the order is left as it is.

    Raises:
        InputError: a rank that its size does not have, or an order that is none.
    """

    context_size: int = 1
    context_rank: int = 0
    context_order: ContextOrder = "zigzag"
    sequence_size: int = 1
    sequence_rank: int = 0
    batch_first: bool = False

    def __post_init__(self) -> None:
        for kind in ("context", "sequence"):
            size, rank = getattr(self, f"{kind}_size"), getattr(self, f"{kind}_rank")
            if not all(type(each) is int for each in (size, rank)) or not 0 <= rank < size:
                raise InputError(
                    f"{kind}_rank must be one of 0 to {kind}_size - 1, got rank {rank!r} of {size!r} rank(s)"
                )
        if self.context_order not in get_args(ContextOrder):
            raise InputError(f"context_order is {' or '.join(get_args(ContextOrder))}, got {self.context_order!r}")

    @property
    def num_parts(self) -> int:
        """Parts that a batch is cut into."""
        return self.context_size * self.sequence_size

    @property
    def part(self) -> int:
        """This rank's among them, from 0."""
        return self.context_rank * self.sequence_size + self.sequence_rank

    def called(self, layout: BatchLayout) -> BatchLayout:
        """The places that the model is called with on this rank: those of `layout` after context parallelism.

        Raises:
            InputError: a layout that was cut already, or sizes that do not divide.
        """
        require_layout(layout)
        if self.context_size == 1:
            return layout
        if layout.called_shape is None or layout.cut_bounds is None:
            raise _cut_already(layout, f"context parallelism over {self.context_size} ranks")
        batch, _ = layout.called_shape
        steps = self._context_steps(layout.cut_bounds)
        part = layout.at((steps[:, None] * batch + torch.arange(batch)).flatten())
        return replace(part, called_shape=(batch, len(steps)))

    def routed(self, layout: BatchLayout) -> BatchLayout:
        """The places that this rank's routers see: those of `called`, after sequence parallelism.

        Raises:
            InputError: a layout that was cut already, or sizes that do not divide.
        """
        called = self.called(layout)
        if called.called_shape is None:
            if self.sequence_size > 1:
                raise _cut_already(layout, f"sequence parallelism over {self.sequence_size} ranks")
            return called
        batch, steps = called.called_shape
        # Of one sequence both orders are the same.
        if self.sequence_size == 1 and (batch == 1 or not self.batch_first):
            return called
        if steps % self.sequence_size:
            raise InputError(
                f"a model that is called with {steps} places of the sequence dimension cannot share them among"
                f" {self.sequence_size} ranks of sequence parallelism: pad {_what(layout)} to a multiple of"
                f" {self._multiple}"
            )
        size = steps // self.sequence_size
        own = torch.arange(size * self.sequence_rank, size * (self.sequence_rank + 1))
        places = own[:, None] * batch + torch.arange(batch)
        return called.at((places.T if self.batch_first else places).flatten())

    def _context_steps(self, bounds: Tensor) -> Tensor:
        """Steps of the sequence dimension on this rank, `int64`, ascending."""
        rank, size = self.context_rank, self.context_size
        if self.context_order == "contiguous":
            bounds, parts, own = bounds[[0, -1]], size, torch.tensor([rank])
        else:
            parts, own = 2 * size, torch.tensor([rank, 2 * size - 1 - rank])
        lengths = bounds.diff()
        for index in (lengths % parts).nonzero().flatten().tolist()[:1]:
            whole = "the batch" if len(lengths) == 1 else f"sequence {index} of the pack"
            raise InputError(
                f"{whole} has {int(lengths[index])} places, which {size} ranks of context parallelism cannot cut into"
                f" {parts} parts ({self.context_order}): pad {'it' if len(lengths) == 1 else 'every sequence'} to a"
                f" multiple of {self._multiple}{'' if len(lengths) == 1 else ', inside of its bounds in cu_seqlens'}"
            )
        part = lengths // parts
        starts = (bounds[:-1, None] + own * part[:, None]).flatten()
        runs = part.repeat_interleave(len(own))
        # Each run counts on from its start, wherever it comes to stand.
        return torch.arange(int(runs.sum())) + (starts - runs.cumsum(0) + runs).repeat_interleave(runs)

    @property
    def _multiple(self) -> int:
        halves = 2 if self.context_order == "zigzag" and self.context_size > 1 else 1
        return halves * self.context_size * self.sequence_size


def _what(layout: BatchLayout) -> str:
    return "every sequence" if layout.called_shape is not None and layout.called_shape[0] == 1 else "the batch"


def _cut_already(layout: BatchLayout, what: str) -> InputError:
    return InputError(
        f"the {layout.num_places} places of this layout are some of a batch already (it was built by at() or from"
        f" vectors, or cut before) and {what} cannot cut them again: hand over the layout of whole sequences, from"
        " BatchLayout.padded, packed or jagged"
    )
