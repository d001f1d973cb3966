"""Which place of a router's input is which token of which sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from router_replay.errors import InputError

Integers = Sequence[int] | Tensor
Index = Integers | slice


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """The tokens of one microbatch in the order in which a trainer's routers see them.

    A *place* is a row of a router's input. Two vectors say what each place is; whatever a rank sees of a batch is an
    index into them, `at`. Build a layout with `padded` or `packed`. Everything is on the CPU: token ids that are on a
    device are copied once, before the forward pass.

    Attributes:
        sequence: `int64 [num_places]`, the sequence of each place; -1 for padding.
        position: `int64 [num_places]`, the place's position in its sequence; -1 for padding.
        token_ids: `int64 [num_tokens]`, the whole sequences one behind the other, without padding, also those parts of
            them that have no place here.
        cu_seqlens: `int64 [num_sequences + 1]`, bounds of the sequences in `token_ids`.

    Raises:
        InputError: vectors that do not fit each other, a position outside of its sequence, or a token with two places.
    """

    sequence: Tensor
    position: Tensor
    token_ids: Tensor
    cu_seqlens: Tensor

    def __post_init__(self) -> None:
        vectors = {name: getattr(self, name) for name in ("sequence", "position", "token_ids", "cu_seqlens")}
        for name, vector in vectors.items():
            if (
                not isinstance(vector, Tensor)
                or vector.dtype != torch.int64
                or vector.dim() != 1
                or vector.device.type != "cpu"
            ):
                raise InputError(f"{name} must be an int64 vector on the CPU, got {_described(vector)}")
        if self.sequence.shape != self.position.shape:
            raise InputError(
                f"sequence {list(self.sequence.shape)} and position {list(self.position.shape)} must have one entry for"
                " each place"
            )
        bounds = self.cu_seqlens
        if not len(bounds) or bounds[0] != 0 or bounds[-1] != len(self.token_ids) or bool((bounds.diff() < 0).any()):
            raise InputError(
                f"cu_seqlens must rise from 0 to the {len(self.token_ids)} tokens of all sequences, got"
                f" {bounds.tolist()}"
            )
        padding = self.sequence == -1
        sequence, position = self.sequence[~padding], self.position[~padding]
        outside = (sequence < 0) | (sequence >= self.num_sequences)
        if bool((self.position[padding] != -1).any()) or bool(outside.any()):
            raise InputError(
                f"places must be of the sequences 0 to {self.num_sequences - 1}, or -1 in both vectors for padding"
            )
        if bool(((position < 0) | (position >= self.lengths[sequence])).any()):
            raise InputError("a place has a position outside of its sequence")
        tokens = self.cu_seqlens[sequence] + position
        if bool((torch.bincount(tokens, minlength=1) > 1).any()):
            raise InputError("a token has two places: every token's route can be replayed at one place of a router")

    @classmethod
    def padded(cls, token_ids: Tensor, lengths: Integers, *, side: Literal["right", "left"] = "right") -> BatchLayout:
        """A padded batch, which Megatron flattens from `[S, B, H]`: place = s * B + b.

        Args:
            token_ids: int `[B, S]`.
            lengths: B numbers of tokens, each at most S.
            side: where the padding is.

        Raises:
            InputError: lengths that do not fit the shape, or token ids that are none.
        """
        ids = _token_ids(token_ids)
        if ids.dim() != 2:
            raise InputError(f"a padded batch needs token ids of shape [B, S], got {list(ids.shape)}")
        if side not in ("right", "left"):
            raise InputError(f"side is where the padding is, 'right' or 'left', got {side!r}")
        batch, width = ids.shape
        counts = _integers(lengths, "lengths")
        if len(counts) != batch:
            raise InputError(f"token ids hold {batch} sequences, lengths are given for {len(counts)}")
        for index in ((counts < 0) | (counts > width)).nonzero().flatten().tolist():
            raise InputError(
                f"sequence {index} is said to have {int(counts[index])} tokens, its row of token ids has {width}"
            )
        position = torch.arange(width).expand(batch, width)
        if side == "left":
            position = position - (width - counts)[:, None]
        is_token = (position >= 0) & (position < counts[:, None])
        sequence = torch.arange(batch)[:, None].expand(batch, width)
        return cls(
            sequence.where(is_token, -1).T.flatten(),
            position.where(is_token, -1).T.flatten(),
            ids[is_token],
            _bounds(counts),
        )

    @classmethod
    def packed(cls, token_ids: Tensor, cu_seqlens: Integers, lengths: Integers | None = None) -> BatchLayout:
        """Sequences one behind the other (`thd`): place = place in the pack.

        Args:
            token_ids: int `[T]` or `[1, T]`.
            cu_seqlens: N + 1 bounds of N sequences, from 0 to T (`cu_seqlens_q_padded` where sequences are aligned).
            lengths: N numbers of tokens where sequences are followed by alignment padding inside their bounds; by
                default every place between two bounds is a token.

        Raises:
            InputError: bounds or lengths that do not fit the pack, or token ids that are none.
        """
        ids = _token_ids(token_ids)
        if ids.dim() == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.dim() != 1:
            raise InputError(f"a packed batch needs token ids of shape [T] or [1, T], got {list(ids.shape)}")
        bounds = _integers(cu_seqlens, "cu_seqlens")
        if len(bounds) < 2 or int(bounds[0]) != 0 or int(bounds[-1]) != ids.numel():
            raise InputError(
                f"cu_seqlens must go from 0 to the pack's {ids.numel()} tokens, but go from "
                f"{int(bounds[0]) if len(bounds) else 'nothing'} to {int(bounds[-1]) if len(bounds) else 'nothing'};"
                " where the pack ends in padding, let the last sequence's bound include it and give lengths"
            )
        room = bounds.diff()
        if bool((room < 0).any()):
            raise InputError(f"cu_seqlens must not fall, got {bounds.tolist()}")
        counts = room if lengths is None else _integers(lengths, "lengths")
        if len(counts) != len(room):
            raise InputError(f"cu_seqlens bound {len(room)} sequences, lengths are given for {len(counts)}")
        for index in ((counts < 0) | (counts > room)).nonzero().flatten().tolist():
            raise InputError(
                f"sequence {index} is said to have {int(counts[index])} tokens, its bounds have room for"
                f" {int(room[index])}"
            )
        sequence = torch.repeat_interleave(torch.arange(len(room)), room)
        position = torch.arange(ids.numel()) - bounds[sequence]
        is_token = position < counts[sequence]
        return cls(sequence.where(is_token, -1), position.where(is_token, -1), ids[is_token], _bounds(counts))

    def at(self, index: Index) -> BatchLayout:
        """The layout of some of the places, in the index's order: what a rank sees of the batch, say.

        Args:
            index: places of this layout, each at most once, as integers, a slice or a bool mask; -1 is a place of
                padding that this layout does not have.

        Raises:
            InputError: a place that is not there, or twice.
        """
        if isinstance(index, slice):
            places = torch.tensor(range(self.num_places)[index], dtype=torch.int64)
        elif isinstance(index, Tensor) and index.dtype == torch.bool:
            if index.shape != self.sequence.shape:
                raise InputError(f"a mask of places must be bool [{self.num_places}], got {list(index.shape)}")
            places = index.cpu().nonzero().flatten()
        else:
            places = _integers(index, "an index of places")
        if bool(((places < -1) | (places >= self.num_places)).any()):
            raise InputError(
                f"an index of places goes from {int(places.min())} to {int(places.max())}, and this layout has the"
                f" places 0 to {self.num_places - 1}, and -1 for padding"
            )
        # What is put behind the last place is what -1 picks.
        padding = self.sequence.new_full((1,), -1)
        sequence, position = (torch.cat([each, padding])[places] for each in (self.sequence, self.position))
        return BatchLayout(sequence, position, self.token_ids, self.cu_seqlens)

    @property
    def num_places(self) -> int:
        """Rows of a router's input."""
        return len(self.sequence)

    @property
    def num_sequences(self) -> int:
        """Number of sequences, empty ones and those without a place here included."""
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, `int64 [num_sequences]`, whether or not they have a place here."""
        return self.cu_seqlens.diff()

    @property
    def is_padding(self) -> Tensor:
        """Which places are of no token, `bool [num_places]`."""
        return self.sequence < 0

    def by_sequence(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """A tensor with an entry for each of `token_ids`, `[num_tokens, ...]`, cut at the bounds of the sequences."""
        return tokens.split(self.lengths.tolist())

    def of_tokens(self, values: Tensor, fill: float) -> Tensor:
        """Values of places, `[num_places, ...]` on any device, as values of tokens `[num_tokens, ...]`.

        Tokens that have no place here get `fill`, and padding goes nowhere.
        """
        inside = ~self.is_padding
        tokens = (self.cu_seqlens[self.sequence[inside]] + self.position[inside]).to(values.device)
        result = values.new_full((len(self.token_ids), *values.shape[1:]), fill)
        result[tokens] = values[inside.to(values.device)]
        return result


def require_layout(layout: object) -> None:
    """Raise InputError unless it is a `BatchLayout`."""
    if not isinstance(layout, BatchLayout):
        found = "None" if layout is None else f"a {type(layout).__name__}"
        raise InputError(
            f"the layout of a microbatch is {found}: build it with BatchLayout.padded(token_ids, lengths) or"
            " BatchLayout.packed(token_ids, cu_seqlens)"
        )


def _bounds(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _token_ids(values: Tensor) -> Tensor:
    if not isinstance(values, Tensor) or values.is_floating_point() or values.dtype == torch.bool:
        raise InputError(
            f"token ids must be an int tensor, got {_described(values)}: pass what the model is called with"
        )
    return values.detach().cpu().long()


def _integers(values: Integers, what: str) -> Tensor:
    try:
        tensor = values.detach().cpu() if isinstance(values, Tensor) else torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} must be integers, got {_described(values)}: {error}") from error
    # An empty list has no dtype of its own.
    if tensor.dim() != 1 or (tensor.numel() and (tensor.is_floating_point() or tensor.dtype == torch.bool)):
        raise InputError(f"{what} must be a vector of integers, got {_described(tensor)}")
    return tensor.long()


def _described(value: object) -> str:
    return f"{value.dtype} {list(value.shape)} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
