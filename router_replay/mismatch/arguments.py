"""What a batch is described with: tensors, masks, bounds of sequences and ids of prompts, in one form or refused."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.segments import Segments

GroupIds = Sequence[Hashable] | Tensor
"""One for each sequence, equal for the responses to one prompt: an int tensor, or numbers, strings, ... of any kind."""


def require_tensors(**tensors: object) -> None:
    """Raise InputError for the first that is no tensor, by its name."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise InputError(
                f"{name} must be a torch.Tensor, got {described(tensor)}: torch.as_tensor(...) makes one of an array"
                " or a list of numbers"
            )


def lengths_of(cu_seqlens: Sequence[int] | Tensor, num_tokens: int) -> list[int]:
    """Tokens of each sequence.

    Raises:
        InputError: bounds that are no integers, or not those of `num_tokens` tokens.
    """
    bounds = _integers(cu_seqlens)
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    if lengths and bounds[0] == 0 and bounds[-1] == num_tokens and min(lengths) >= 0:
        return lengths
    times, rest = divmod(bounds[-1], num_tokens) if bounds and num_tokens else (0, 0)
    parts = (
        f". They are of {times} times as many tokens: under context parallelism give bounds of this rank's parts, and"
        " the ranks that hold the others as context_group"
    )
    raise InputError(
        f"cu_seqlens must rise from 0 to the mask's {num_tokens} tokens, got {bounds[:8]}"
        f"{'...' if len(bounds) > 8 else ''} up to {bounds[-1] if bounds else 'nothing'}"
        f"{parts if times > 1 and not rest else ''}"
    )


def _integers(values: Sequence[int] | Tensor) -> list[int]:
    try:
        if isinstance(values, str):
            raise TypeError
        return [operator.index(each) for each in (values.tolist() if isinstance(values, Tensor) else values)]
    except TypeError:
        raise InputError(f"cu_seqlens must be S + 1 integers, got {str(values)[:80]}") from None


def described(value: object) -> str:
    if isinstance(value, Tensor):
        return str(list(value.shape))
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def boolean(mask: Tensor) -> Tensor:
    """The mask as bool; of another dtype it has to hold 0 and 1, for which the device is waited for."""
    if mask.dtype == torch.bool:
        return mask
    if bool(((mask != 0) & (mask != 1)).any()):
        raise InputError(f"a response mask must be bool, or hold 0 and 1; this {mask.dtype} tensor holds others")
    return mask == 1


def ids_of(group_ids: GroupIds | None, num_sequences: int) -> tuple[Hashable, ...] | None:
    """The ids of all sequences' prompts, as they were given."""
    if group_ids is None:
        return None
    ids = tuple(group_ids.tolist() if isinstance(group_ids, Tensor) else group_ids)
    if len(ids) != num_sequences:
        raise InputError(f"{len(ids)} group ids are given for {num_sequences} sequences: one for each")
    return ids


def groups_of(ids: tuple[Hashable, ...] | None, device: torch.device) -> Segments | None:
    """Sequences as items of their prompts, numbered in the order in which these come."""
    if ids is None:
        return None
    try:
        numbers = {group: number for number, group in enumerate(dict.fromkeys(ids))}
    except TypeError as error:
        raise InputError(f"group ids must be one number or name for each sequence ({error})") from error
    of_prompt = Segments.of(torch.tensor([numbers[group] for group in ids], dtype=torch.int64), len(numbers))
    return of_prompt.to(device)
