"""Which rows of a router's input belong to which token of which sequence."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from router_replay.errors import InputError

Lengths = Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """The tokens of one microbatch in the order in which Megatron's routers see them.

    Build one with `padded` or `packed`. Everything is kept on the CPU: token ids that live on a device
    are copied here once, before the forward pass.

    Attributes:
        num_rows: rows of a router's input.
        token_ids: per sequence its token ids `int64 [n_i]`, without padding.
        rows: per sequence the row of each of its tokens, `int64 [n_i]`.
        padding_rows: the rows of no token, `int64 [P]`.
    """

    num_rows: int
    token_ids: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]
    padding_rows: Tensor

    @classmethod
    def padded(cls, token_ids: Tensor, lengths: Lengths) -> BatchLayout:
        """A batch padded on the right, which Megatron flattens from `[S, B, H]`: row = s * B + b.

        Args:
            token_ids: int `[B, S]`.
            lengths: B numbers of tokens, each at most S.

        Raises:
            InputError: lengths that do not fit the shape.
        """
        if token_ids.dim() != 2:
            raise InputError(f"a padded batch needs token ids of shape [B, S], got {list(token_ids.shape)}")
        batch, width = token_ids.shape
        counts = _integers(lengths)
        if len(counts) != batch:
            raise InputError(f"token ids hold {batch} sequences, lengths are given for {len(counts)}")
        for index, count in enumerate(counts):
            if not 0 <= count <= width:
                raise InputError(f"sequence {index} is said to have {count} tokens, its row of token ids has {width}")
        ids = token_ids.detach().cpu().long()
        rows = tuple(torch.arange(count) * batch + index for index, count in enumerate(counts))
        return cls._build(batch * width, tuple(ids[i, :count] for i, count in enumerate(counts)), rows)

    @classmethod
    def packed(cls, token_ids: Tensor, cu_seqlens: Lengths, lengths: Lengths | None = None) -> BatchLayout:
        """Sequences one behind the other (`thd`): row = place in the pack.

        Args:
            token_ids: int `[T]` or `[1, T]`.
            cu_seqlens: N + 1 bounds of N sequences, from 0 to T (`cu_seqlens_q_padded` where sequences are aligned).
            lengths: N numbers of tokens where sequences are followed by alignment padding inside their bounds; by
                default every place between two bounds is a token.

        Raises:
            InputError: bounds or lengths that do not fit the pack.
        """
        if token_ids.dim() == 2 and token_ids.shape[0] == 1:
            token_ids = token_ids[0]
        if token_ids.dim() != 1:
            raise InputError(f"a packed batch needs token ids of shape [T] or [1, T], got {list(token_ids.shape)}")
        bounds = _integers(cu_seqlens)
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != token_ids.numel():
            raise InputError(
                f"cu_seqlens must go from 0 to the pack's {token_ids.numel()} tokens, but go from "
                f"{bounds[0] if bounds else 'nothing'} to {bounds[-1] if bounds else 'nothing'}; where the pack ends in"
                " padding, let the last sequence's bound include it and give lengths"
            )
        room = [end - begin for begin, end in itertools.pairwise(bounds)]
        if min(room) < 0:
            raise InputError(f"cu_seqlens must not fall, got {bounds}")
        counts = room if lengths is None else _integers(lengths)
        if len(counts) != len(room):
            raise InputError(f"cu_seqlens bound {len(room)} sequences, lengths are given for {len(counts)}")
        for index, (count, space) in enumerate(zip(counts, room, strict=True)):
            if not 0 <= count <= space:
                raise InputError(f"sequence {index} is said to have {count} tokens, its bounds have room for {space}")
        ids = token_ids.detach().cpu().long()
        rows = tuple(torch.arange(begin, begin + count) for begin, count in zip(bounds, counts, strict=False))
        return cls._build(ids.numel(), tuple(ids[row] for row in rows), rows)

    @classmethod
    def _build(cls, num_rows: int, token_ids: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> BatchLayout:
        is_padding = torch.ones(num_rows, dtype=torch.bool)
        is_padding[torch.cat(rows)] = False
        return cls(num_rows, token_ids, rows, is_padding.nonzero().flatten())

    @property
    def num_sequences(self) -> int:
        """Number of sequences, empty ones included."""
        return len(self.rows)


def _integers(values: Lengths) -> list[int]:
    return [int(value) for value in (values.tolist() if isinstance(values, Tensor) else values)]
