"""The response tokens of a batch, padded or packed, and sums over the sequences and prompt groups they belong to."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.segments import Segments

GroupIds = Sequence[Hashable] | Tensor
"""One for each sequence, equal for the responses to one prompt: an int tensor, or numbers, strings, ... of any kind."""


@dataclass(frozen=True, eq=False)
class Responses:
    """Which tokens of a batch are response tokens, of which sequence, of which prompt.

    Build one with `padded` or `packed`. Every function of this package takes tensors with one value per
    token in the shape of the mask (the *tokens' shape*, `[B, T]` or `[N]`) and ignores what they hold outside it.

    Sequences must be whole. Under context parallelism a rank holds a part of each, and sums over sequences (sequence
    weights, masks of sequences, GSPO, perplexities) would be sums over parts: gather log-probabilities and masks over
    the context-parallel group first.

    Attributes:
        mask: bool, in the tokens' shape, True for tokens that the rollout sampled.
        tokens: all tokens as items of their sequences, which follow each other.
        groups: sequences as items of their prompts, or None where prompts are not known.
        group_ids: `[S]` ids of the prompts as they were given, or None.
    """

    mask: Tensor
    tokens: Segments
    groups: Segments | None
    group_ids: tuple[Hashable, ...] | None = None

    @classmethod
    def padded(cls, mask: Tensor, group_ids: GroupIds | None = None) -> Responses:
        """Sequences of one length.

        Args:
            mask: bool or 0/1, `[B, T]`.
            group_ids: `[B]`, equal for the responses to one prompt; what compares those refuses to without it.

        Raises:
            InputError: shapes that do not fit, or a mask of other values.
        """
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise InputError(f"a padded response mask must be a tensor [B, T], got {_described(mask)}")
        batch, width = mask.shape
        number = torch.arange(batch * width, device=mask.device)
        counts = torch.full((batch,), width, device=mask.device)
        tokens = Segments(number // max(width, 1), number % max(width, 1), counts, width)
        ids = _ids(group_ids, batch)
        return cls(_boolean(mask), tokens, _groups(ids, mask.device), ids)

    @classmethod
    def packed(cls, mask: Tensor, cu_seqlens: Sequence[int] | Tensor, group_ids: GroupIds | None = None) -> Responses:
        """Sequences one behind the other.

        Args:
            mask: bool or 0/1, `[N]`.
            cu_seqlens: S + 1 bounds of S sequences, from 0 to N, that do not fall.
            group_ids: `[S]`, as for `padded`.

        Raises:
            InputError: shapes or bounds that do not fit, or a mask of other values.
        """
        if not isinstance(mask, Tensor) or mask.dim() != 1:
            raise InputError(f"a packed response mask must be a tensor [N], got {_described(mask)}")
        bounds = _integers(cu_seqlens)
        lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
        if not lengths or bounds[0] != 0 or bounds[-1] != len(mask) or min(lengths) < 0:
            raise InputError(
                f"cu_seqlens must rise from 0 to the mask's {len(mask)} tokens, got {bounds[:8]}"
                f"{'...' if len(bounds) > 8 else ''} up to {bounds[-1] if bounds else 'nothing'}"
            )
        sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(mask.device)
        ids = _ids(group_ids, len(lengths))
        return cls(_boolean(mask), Segments.of(sequence, len(lengths)), _groups(ids, mask.device), ids)

    @property
    def num_sequences(self) -> int:
        """Number of sequences, those without a response token included."""
        return self.tokens.num_segments

    @property
    def prompts(self) -> Segments:
        """`groups`, for a function that compares the responses to one prompt.

        Raises:
            InputError: no group ids were given.
        """
        if self.groups is None:
            raise InputError(
                "responses to one prompt are compared, and it is not known which those are: give group_ids to"
                " Responses.padded or Responses.packed"
            )
        return self.groups

    @cached_property
    def lengths(self) -> Tensor:
        """Response tokens of each sequence, int64 `[S]`."""
        none = torch.zeros(self.num_sequences, dtype=torch.int64, device=self.mask.device)
        return none.index_add_(0, self.tokens.segment, self.mask.flatten().long())

    @property
    def cu_seqlens(self) -> Tensor:
        """Bounds of the sequences among all tokens, int64 `[S + 1]`, from 0 to the number of tokens."""
        return torch.nn.functional.pad(self.tokens.counts.cumsum(0), (1, 0))

    def keep(self, mask: Tensor) -> Responses:
        """Only response tokens where `mask` (bool or 0/1, tokens' shape) holds: the others leave all denominators."""
        self.require(mask=mask)
        return Responses(self.mask & _boolean(mask), self.tokens, self.groups, self.group_ids)

    def require(self, **tensors: Tensor) -> None:
        """Raise InputError unless every tensor has the tokens' shape and the mask's device."""
        require_tensors(**tensors)
        for name, tensor in tensors.items():
            self._require_device(name, tensor)
            if tensor.shape != self.mask.shape:
                raise InputError(
                    f"{name} {list(tensor.shape)} and the response mask {list(self.mask.shape)} must have one shape"
                )

    def is_per_sequence(self, **named: Tensor) -> bool:
        """Whether a tensor is `[S]`, one for each sequence, and not in the tokens' shape.

        Raises:
            InputError: it is neither, or it could be both and they differ: as many packed tokens as sequences.
        """
        ((name, values),) = named.items()
        require_tensors(**named)
        self._require_device(name, values)
        if values.shape != (self.num_sequences,):
            if values.shape != self.mask.shape:
                raise InputError(
                    f"{name} {list(values.shape)} must be [{self.num_sequences}], one for each sequence, or have the"
                    f" response mask's shape {list(self.mask.shape)}"
                )
            return False
        if self.mask.shape != values.shape:
            return True
        if bool((self.tokens.segment != torch.arange(self.num_sequences, device=self.mask.device)).any()):
            raise InputError(
                f"{name} {list(values.shape)} may be one for each of {self.num_sequences} sequences or one for each of"
                f" {self.num_sequences} packed tokens: pad the batch, whose tokens then have two dimensions"
            )
        return False

    def rectangle(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Tokens' shape to `[S, W]`, with `fill` for all but response tokens."""
        return self.tokens.spread(values.masked_fill(~self.mask, fill).flatten(), fill)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over each sequence's response tokens: tokens' shape to `[S]`, 0 where there are none.

        In float64 and in one order, on any device: ranks that hold the same tokens get the same bits.
        """
        return self._reduce(values.double(), "sum", 0.0).to(values.dtype)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each sequence's response tokens: tokens' shape to `[S]`, 0 where there are none."""
        return self.sum(values) / self.lengths.clamp(min=1)

    def max(self, values: Tensor) -> Tensor:
        """Maximum over each sequence's response tokens: tokens' shape to `[S]`, -inf where there are none."""
        return self._reduce(values, "max", -torch.inf)

    def expand(self, per_sequence: Tensor) -> Tensor:
        """`[S]` to the tokens' shape, 0 (False) for all but response tokens."""
        return per_sequence[self.tokens.segment].view(self.mask.shape).masked_fill(~self.mask, 0)

    def _reduce(self, values: Tensor, reduction: str, initial: float) -> Tensor:
        flat = values.masked_fill(~self.mask, initial).flatten()
        # Counts that sum to the number of tokens are what `unsafe` leaves unchecked, for a transfer from the device.
        return torch.segment_reduce(flat, reduction, lengths=self.tokens.counts, unsafe=True, initial=initial)

    def _require_device(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.mask.device:
            raise InputError(f"{name} is on {tensor.device}, the response mask on {self.mask.device}: move one")


def require_tensors(**tensors: object) -> None:
    """Raise InputError for the first that is no tensor, by its name."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise InputError(
                f"{name} must be a torch.Tensor, got {_described(tensor)}: torch.as_tensor(...) makes one of an array"
                " or a list of numbers"
            )


def require_responses(responses: object) -> None:
    """Raise InputError unless it is a `Responses`: a mask alone does not say which tokens are of one sequence."""
    if not isinstance(responses, Responses):
        raise InputError(
            f"responses must be a Responses, got {'a tensor ' * isinstance(responses, Tensor)}{_described(responses)}:"
            " make one with Responses.padded(mask) or Responses.packed(mask, cu_seqlens)"
        )


def _integers(values: Sequence[int] | Tensor) -> list[int]:
    try:
        if isinstance(values, str):
            raise TypeError
        return [operator.index(each) for each in (values.tolist() if isinstance(values, Tensor) else values)]
    except TypeError:
        raise InputError(f"cu_seqlens must be S + 1 integers, got {str(values)[:80]}") from None


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return str(list(value.shape))
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _boolean(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if bool(((mask != 0) & (mask != 1)).any()):
        raise InputError(f"a response mask must be bool, or hold 0 and 1; this {mask.dtype} tensor holds others")
    return mask == 1


def _ids(group_ids: GroupIds | None, num_sequences: int) -> tuple[Hashable, ...] | None:
    if group_ids is None:
        return None
    ids = tuple(group_ids.tolist() if isinstance(group_ids, Tensor) else group_ids)
    if len(ids) != num_sequences:
        raise InputError(f"{len(ids)} group ids are given for {num_sequences} sequences: one for each")
    return ids


def _groups(ids: tuple[Hashable, ...] | None, device: torch.device) -> Segments | None:
    if ids is None:
        return None
    try:
        numbers = {group: number for number, group in enumerate(dict.fromkeys(ids))}
    except TypeError as error:
        raise InputError(f"group ids must be one number or name for each sequence ({error})") from error
    return Segments.of(torch.tensor([numbers[group] for group in ids], dtype=torch.int64, device=device), len(numbers))
