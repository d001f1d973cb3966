"""Sequences of which every context-parallel rank holds a part, and the order in which their tokens belong together."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from router_replay.errors import InputError, PairingError
from router_replay.mismatch.ranks import gathered, rows_of_all, summed
from router_replay.mismatch.segments import Segments


@dataclass(frozen=True, eq=False)
class Parts:
    """This rank's part of sequences that the ranks of a group hold together.

    Attributes:
        group: the context-parallel ranks.
        sizes: tokens of each rank of the group.
        order: of all ranks' tokens, rank after rank, the order that puts each sequence's together, by position, int64
            `[n]`; None where positions are not known.
        tokens: those tokens, so ordered, as items of their sequences; or None.
    """

    group: dist.ProcessGroup
    sizes: tuple[int, ...]
    order: Tensor | None = None
    tokens: Segments | None = None

    @classmethod
    def of(
        cls,
        group: dist.ProcessGroup,
        tokens: Segments,
        mask: Tensor,
        group_ids: tuple[Hashable, ...] | None,
        positions: Tensor | None,
    ) -> Parts:
        """Every rank of the group calls it, and waits for the device.

        Args:
            tokens: this rank's, as items of their sequences.
            mask: those that are response tokens, bool `[N]`.
            group_ids: of the sequences.
            positions: int64 `[N]`, the position of each token in its whole sequence, or None.

        Raises:
            PairingError: the ranks do not hold parts of the same sequences.
            InputError: two response tokens have the same position. Both on every rank alike.
        """
        given = (tokens.num_segments, group_ids, positions is not None, len(mask))
        all_given = gathered(given, group)
        for rank, other in enumerate(all_given):
            if other[:3] != all_given[0][:3]:
                raise PairingError(
                    f"ranks {dist.get_global_rank(group, 0)} and {dist.get_global_rank(group, rank)} of a context group"
                    f" must hold parts of the same sequences: the first has {_said(all_given[0])}, the other"
                    f" {_said(other)}. Data-parallel ranks have batches of their own and are no context group"
                )
        sizes = tuple(each[3] for each in all_given)
        if positions is None:
            return cls(group, sizes)
        # What is no response token may have any position, and need not be between others.
        columns = torch.stack([tokens.segment, positions.masked_fill(~mask, -1), mask.long()], 1)
        sequence, position, counted = rows_of_all(columns, sizes, group).unbind(1)
        order = position.argsort(stable=True)
        order = order[sequence[order].argsort(stable=True)]
        _require_one_each(sequence[order], position[order], counted[order] > 0)
        return cls(group, sizes, order, Segments(sequence[order], summed(tokens.counts, group)))

    def whole(self, shape: torch.Size) -> tuple[Segments, Joined]:
        """All tokens of whole sequences, and the way there of this rank's, whose shape is given.

        Raises:
            InputError: positions are not known; on every rank alike.
        """
        if self.order is None or self.tokens is None:
            raise InputError(
                "the order of a sequence's tokens counts here, and every rank holds a part of each: give their"
                " positions in the whole sequences to Responses.padded or Responses.packed"
            )
        return self.tokens, Joined(shape, self, self.order)


@dataclass(frozen=True, eq=False)
class Joined:
    """The way from this rank's tokens to those of whole sequences, on every rank, and back.

    Attributes:
        shape: of this rank's tokens.
        parts: None where sequences are whole as they are.
        order: as of `Parts`.
    """

    shape: torch.Size
    parts: Parts | None = None
    order: Tensor | None = None

    def gather(self, values: Tensor) -> Tensor:
        """Tokens' shape to `[n]`, all tokens of whole sequences; detached."""
        flat = values.detach().flatten()
        if self.parts is None or self.order is None:
            return flat
        return rows_of_all(flat, self.parts.sizes, self.parts.group)[self.order]

    def own(self, values: Tensor) -> Tensor:
        """`[n]` back to this rank's tokens, in their shape."""
        if self.parts is None or self.order is None:
            return values.view(self.shape)
        unordered = torch.empty_like(values).index_copy(0, self.order, values)
        rank = dist.get_rank(self.parts.group)
        return unordered.split(self.parts.sizes)[rank].view(self.shape)


def require_whole(positions: Tensor, sequence: Tensor, offset: Tensor, mask: Tensor) -> None:
    """Raise InputError where tokens are parts of sequences although no group was given; waits for the device.

    A whole sequence has its tokens at consecutive positions, none of them further on in the sequence than among the
    tokens that are here.

    Args:
        positions, sequence, offset: of each token, int64 `[N]`: in its whole sequence, which that is, and the number of
            its tokens before it here.
        mask: bool `[N]`, response tokens.
    """
    shift = (positions - offset).masked_fill(~mask, 0)
    num_sequences = int(sequence.max()) + 1 if len(sequence) else 0
    lowest, highest = (
        torch.zeros(num_sequences, dtype=torch.int64, device=shift.device).scatter_reduce(
            0, sequence[mask], shift[mask], reduction, include_self=False
        )
        for reduction in ("amin", "amax")
    )
    wrong = (lowest != highest) | (highest > 0)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise InputError(
            f"sequence {first} has response tokens at positions that are not consecutive, or after tokens that are not"
            f" here: {int(wrong.sum())} of {num_sequences} sequences are parts. Under context parallelism give the"
            " ranks that hold the others as context_group"
        )


def _require_one_each(sequence: Tensor, position: Tensor, counted: Tensor) -> None:
    twice = (sequence[1:] == sequence[:-1]) & (position[1:] == position[:-1]) & counted[1:]
    if bool(twice.any()):
        at = int(twice.nonzero()[0]) + 1
        raise InputError(
            f"{int(twice.sum())} response tokens of the context group have the position of another; the first is at"
            f" position {int(position[at])} of sequence {int(sequence[at])}: positions are those in the whole sequence,"
            " every token is on one rank, and data-parallel ranks are no context group"
        )


def _said(given: tuple[int, tuple[Hashable, ...] | None, bool, int]) -> str:
    num_sequences, group_ids, positions, _ = given
    return (
        f"{num_sequences} sequences, {'no group ids' if group_ids is None else f'group ids {str(group_ids)[:60]}'} and"
        f" {'positions' if positions else 'no positions'}"
    )
