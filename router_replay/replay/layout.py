"""Which place of a router's input is which token of which sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.replay import batch_formats
from router_replay.replay.batch_formats import Integers, described, integers

Index = Integers | slice


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """The tokens of one microbatch in the order in which a trainer's routers see them.

    A *place* is a row of a router's input. Two vectors say what each place is; whatever a rank sees of a batch is an
    index into them: `Shards` finds it, `at` takes any. Build a layout of whole sequences with `padded`, `packed` or
    `jagged`. Everything is on the CPU: token ids that are on a device are copied once, before the forward pass.

    Attributes:
        sequence: `int64 [num_places]`, the sequence of each place; -1 for padding.
        position: `int64 [num_places]`, the place's position in its sequence; -1 for padding.
        token_ids: `int64 [num_tokens]`, the whole sequences one behind the other, without padding, also those parts of
            them that have no place here.
        cu_seqlens: `int64 [num_sequences + 1]`, bounds of the sequences in `token_ids`.
        called_shape: shape `[B, S]`, or `[1, T]` of a pack, of the model's input ids when these are its places, and
            place = s * B + b; None where they are other places than those of a model's call.
        cut_bounds: `int64`, bounds along the model's sequence dimension between which context parallelism cuts: 0 and
            S, or those of a pack, alignment padding included; None where the places are some of a batch already.

    Raises:
        InputError: vectors that do not fit each other, a position outside of its sequence, or a token with two places.
    """

    sequence: Tensor
    position: Tensor
    token_ids: Tensor
    cu_seqlens: Tensor
    called_shape: tuple[int, int] | None = None
    cut_bounds: Tensor | None = None

    def __post_init__(self) -> None:
        vectors = {name: getattr(self, name) for name in ("sequence", "position", "token_ids", "cu_seqlens")}
        for name, vector in vectors.items():
            if (
                not isinstance(vector, Tensor)
                or vector.dtype != torch.int64
                or vector.dim() != 1
                or vector.device.type != "cpu"
            ):
                raise InputError(f"{name} must be an int64 vector on the CPU, got {described(vector)}")
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
        outside = (self.sequence < -1) | (self.sequence >= self.num_sequences)
        if bool((outside | (self.is_padding & (self.position != -1))).any()):
            raise InputError(
                f"places must be of the sequences 0 to {self.num_sequences - 1}, or -1 in both vectors for padding"
            )
        # What is put behind the last sequence is what padding's -1 picks.
        lengths = torch.nn.functional.pad(self.lengths, (0, 1))[self.sequence]
        if bool(((self.position < 0) != self.is_padding).any()) or bool((self.position >= lengths).any()):
            raise InputError("a place has a position outside of its sequence")
        if bool((torch.bincount(self._tokens(), minlength=1)[1:] > 1).any()):
            raise InputError("a token has two places: every token's route can be replayed at one place of a router")
        self._check_call()

    def _check_call(self) -> None:
        if self.called_shape is not None and math.prod(self.called_shape) != self.num_places:
            raise InputError(f"a model called with {list(self.called_shape)} ids has no {self.num_places} places")
        bounds = self.cut_bounds
        if bounds is None:
            return
        steps = None if self.called_shape is None else self.called_shape[1]
        if not len(bounds) or bounds[0] != 0 or int(bounds[-1]) != steps or bool((bounds.diff() < 0).any()):
            raise InputError(
                f"cut_bounds must rise from 0 to the length of the called shape {self.called_shape}, got"
                f" {bounds.tolist()}"
            )

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
        return cls(*batch_formats.padded(token_ids, lengths, side))

    @classmethod
    def packed(cls, token_ids: Tensor, cu_seqlens: Integers, lengths: Integers | None = None) -> BatchLayout:
        """Sequences one behind the other (`thd`): place = place in the pack.

        Args:
            token_ids: int `[T]` or `[1, T]`, the whole pack, before context parallelism.
            cu_seqlens: N + 1 bounds of N sequences, from 0 to T (`cu_seqlens_q_padded` where sequences are aligned).
            lengths: N numbers of tokens where sequences are followed by alignment padding inside their bounds (the
                differences of an unpadded `cu_seqlens_q`); by default every place between two bounds is a token. With
                lengths the pack may end in padding, whether it has bounds of its own, one pair more than there are
                lengths, or lies behind the last bound; it is no sequence and has no masks.

        Raises:
            InputError: bounds or lengths that do not fit the pack, or token ids that are none.
        """
        return cls(*batch_formats.packed(token_ids, cu_seqlens, lengths))

    @classmethod
    def jagged(
        cls, sequences: Tensor | Sequence[Tensor], multiple_of: int = 1, *, cu_seqlens: Integers | None = None
    ) -> BatchLayout:
        """Sequences that a trainer packs by itself, each aligned: place = place in that pack.

        Args:
            sequences: int nested tensor `[B, j]`, or a list of B vectors, without padding.
            multiple_of: of what each sequence's places are a multiple (verl: tensor-parallel size, times twice the
                context-parallel size where that is more than 1).
            cu_seqlens: the pack's bounds in place of a multiple, B + 1, or B + 2 where the last ones bound padding.

        Raises:
            InputError: sequences that are none, or bounds without room for them.
        """
        return cls(*batch_formats.jagged(sequences, multiple_of, cu_seqlens))

    def at(self, index: Index) -> BatchLayout:
        """The layout of some of the places, in the index's order; it cannot be cut into shards any more.

        Args:
            index: places of this layout, each at most once, as integers, a slice or a bool mask; -1 is a place of
                padding that this layout does not have.

        Raises:
            InputError: a place that is not there, or twice.
        """
        if isinstance(index, slice):
            picked = range(self.num_places)[index]
            places = picked.start + picked.step * torch.arange(len(picked))
        elif isinstance(index, Tensor) and index.dtype == torch.bool:
            if index.shape != self.sequence.shape:
                raise InputError(f"a mask of places must be bool [{self.num_places}], got {list(index.shape)}")
            places = index.cpu().nonzero().flatten()
        else:
            places = integers(index, "an index of places")
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

    def called_ids(self) -> Tensor:
        """Token ids as the model is called with them, `int64` of `called_shape`, -1 where a place is padding.

        Raises:
            InputError: the places are not those of a model's call, but some that `at` or sequence parallelism took.
        """
        if self.called_shape is None:
            raise InputError(
                f"the model is not called with the {self.num_places} places of this layout, which are some of a batch:"
                " take the layout before at() or sequence parallelism (Shards.called)"
            )
        batch, steps = self.called_shape
        ids = torch.nn.functional.pad(self.token_ids, (1, 0), value=-1)[self._tokens()]
        return ids.view(steps, batch).T.contiguous()

    def _tokens(self) -> Tensor:
        # 0 for padding: its sequence -1 picks what is put behind the last one, and its position is -1.
        starts = torch.nn.functional.pad(self.cu_seqlens[:-1] + 1, (0, 1), value=1)
        return starts[self.sequence] + self.position

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


def require_layout(layout: object) -> BatchLayout:
    """`layout`, or InputError where it is no `BatchLayout`."""
    if not isinstance(layout, BatchLayout):
        found = "None" if layout is None else f"a {type(layout).__name__}"
        raise InputError(
            f"the layout of a microbatch is {found}: build it with BatchLayout.padded(token_ids, lengths),"
            " BatchLayout.packed(token_ids, cu_seqlens) or BatchLayout.jagged(sequences)"
        )
    return layout
