"""Places of padded, packed and jagged batches, by token ids and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from router_replay.errors import InputError

Integers = Sequence[int] | Tensor


class Places(NamedTuple):
    """A whole batch, in the order of the fields of `BatchLayout`, where they are explained."""

    sequence: Tensor
    position: Tensor
    token_ids: Tensor
    cu_seqlens: Tensor
    called_shape: tuple[int, int]
    cut_bounds: Tensor


def padded(token_ids: Tensor, lengths: Integers, side: Literal["right", "left"]) -> Places:
    """Places of a padded batch; arguments and errors of `BatchLayout.padded`."""
    ids = _token_ids(token_ids)
    if ids.dim() != 2:
        raise InputError(f"a padded batch needs token ids of shape [B, S], got {list(ids.shape)}")
    if side not in ("right", "left"):
        raise InputError(f"side is where the padding is, 'right' or 'left', got {side!r}")
    batch, width = ids.shape
    counts = integers(lengths, "lengths")
    if len(counts) != batch:
        raise InputError(f"token ids hold {batch} sequences, lengths are given for {len(counts)}")
    _require_room(counts, torch.full_like(counts, width), "its row of token ids has")
    position = torch.arange(width).expand(batch, width)
    if side == "left":
        position = position - (width - counts)[:, None]
    is_token = (position >= 0) & (position < counts[:, None])
    sequence = torch.arange(batch)[:, None].expand(batch, width)
    return Places(
        sequence.where(is_token, -1).T.flatten(),
        position.where(is_token, -1).T.flatten(),
        ids[is_token],
        _bounds(counts),
        (batch, width),
        torch.tensor([0, width]),
    )


def packed(token_ids: Tensor, cu_seqlens: Integers, lengths: Integers | None) -> Places:
    """Places of a pack; arguments and errors of `BatchLayout.packed`."""
    ids = _token_ids(token_ids)
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise InputError(f"a packed batch needs token ids of shape [T] or [1, T], got {list(ids.shape)}")
    # A copy, since the layout must not change with what the caller does to his own.
    bounds = integers(cu_seqlens, "cu_seqlens").clone()
    last = int(bounds[-1]) if len(bounds) else -1
    if len(bounds) < 2 or int(bounds[0]) != 0 or last > len(ids) or (last < len(ids) and lengths is None):
        raise InputError(
            f"cu_seqlens must go from 0 to the pack's {len(ids)} tokens, but go from "
            f"{int(bounds[0]) if len(bounds) else 'nothing'} to {last if len(bounds) else 'nothing'};"
            " where the pack ends in padding, give lengths"
        )
    if last < len(ids):
        bounds = torch.cat([bounds, bounds.new_tensor([len(ids)])])
    given = len(cu_seqlens) - 1
    counts = bounds.diff() if lengths is None else integers(lengths, "lengths")
    sequence, position = _in_bounds(bounds, counts, given)
    return Places(sequence, position, ids[sequence >= 0], _bounds(counts), (1, len(ids)), bounds)


def jagged(sequences: Tensor | Sequence[Tensor], multiple_of: int, cu_seqlens: Integers | None) -> Places:
    """Places of a pack of sequences given one by one; arguments and errors of `BatchLayout.jagged`."""
    if not isinstance(sequences, Tensor | Sequence) or (isinstance(sequences, Tensor) and not sequences.is_nested):
        raise InputError(
            f"a jagged batch is a nested tensor [B, j] or a list of vectors, got {described(sequences)}: a padded one"
            " needs BatchLayout.padded"
        )
    parts = list(sequences.unbind() if isinstance(sequences, Tensor) else sequences)
    wrong = next((part for part in parts if not isinstance(part, Tensor) or part.dim() != 1), None)
    if wrong is not None or not parts:
        found = "none" if wrong is None else described(wrong)
        raise InputError(f"a jagged batch needs a vector of token ids for each sequence, got {found}")
    if not isinstance(multiple_of, int) or multiple_of < 1 or (multiple_of > 1 and cu_seqlens is not None):
        raise InputError(
            f"sequences are aligned to a multiple of at least 1, or by cu_seqlens, got multiple_of={multiple_of!r}"
            f"{'' if cu_seqlens is None else ' and cu_seqlens'}"
        )
    ids = _token_ids(torch.cat(parts))
    counts = torch.tensor([len(part) for part in parts])
    if cu_seqlens is None:
        bounds = _bounds((counts + multiple_of - 1) // multiple_of * multiple_of)
    else:
        bounds = integers(cu_seqlens, "cu_seqlens").clone()
        if len(bounds) < 2 or int(bounds[0]) != 0:
            raise InputError(f"cu_seqlens must bound the {len(parts)} sequences from 0 on, got {bounds.tolist()}")
    sequence, position = _in_bounds(bounds, counts, len(bounds) - 1)
    return Places(sequence, position, ids, _bounds(counts), (1, int(bounds[-1])), bounds)


def _in_bounds(bounds: Tensor, counts: Tensor, given: int) -> tuple[Tensor, Tensor]:
    """Sequence and position of every place between the bounds of a pack, of which the caller gave `given` pairs."""
    room = bounds.diff()
    if bool((room < 0).any()):
        raise InputError(f"cu_seqlens must not fall, got {bounds.tolist()}")
    # Trainers end their packs with padding that has bounds of its own.
    if len(counts) not in (given, given - 1):
        raise InputError(
            f"cu_seqlens bound {given} sequences, lengths are given for {len(counts)}: give one for each, or all but"
            " the last where that is padding"
        )
    _require_room(counts, room[: len(counts)], "its bounds have room for")
    counts = torch.nn.functional.pad(counts, (0, len(room) - len(counts)))
    sequence = torch.repeat_interleave(torch.arange(len(room)), room)
    position = torch.arange(len(sequence)) - bounds[sequence]
    is_token = position < counts[sequence]
    return sequence.where(is_token, -1), position.where(is_token, -1)


def _require_room(counts: Tensor, room: Tensor, there: str) -> None:
    for index in ((counts < 0) | (counts > room)).nonzero().flatten().tolist():
        raise InputError(f"sequence {index} is said to have {int(counts[index])} tokens, {there} {int(room[index])}")


def _bounds(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _token_ids(values: Tensor) -> Tensor:
    if not isinstance(values, Tensor) or values.is_floating_point() or values.dtype == torch.bool:
        raise InputError(
            f"token ids must be an int tensor, got {described(values)}: pass what the model is called with"
        )
    return values.detach().cpu().long()


def integers(values: Integers, what: str) -> Tensor:
    """Any vector of integers as `int64` on the CPU; `what` names it in the error.

    Raises:
        InputError: something else.
    """
    try:
        tensor = values.detach().cpu() if isinstance(values, Tensor) else torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} must be integers, got {described(values)}: {error}") from error
    # An empty list has no dtype of its own.
    if tensor.dim() != 1 or (tensor.numel() and (tensor.is_floating_point() or tensor.dtype == torch.bool)):
        raise InputError(f"{what} must be a vector of integers, got {described(tensor)}")
    return tensor.long()


def described(value: object) -> str:
    """A value for an error: dtype, shape and device of a tensor, else its type."""
    return f"{value.dtype} {list(value.shape)} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
