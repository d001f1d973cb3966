"""Numbers of prompts, the same in every process and file that a prompt's responses come from."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Hashable, Sequence
from typing import SupportsIndex, cast

import torch
from torch import Tensor

from router_replay.errors import InputError


def group_numbers(group_ids: Sequence[Hashable]) -> Tensor:
    """Numbers int64 `[S]` of S integers, which stay as they are, or names, which become the same numbers everywhere.

    Raises:
        InputError: an id that is neither, or an integer beyond 64 bits.
    """
    numbers = [_number(group) for group in group_ids]
    try:
        return torch.tensor(numbers, dtype=torch.int64)
    except (OverflowError, ValueError, RuntimeError) as error:
        raise InputError(f"group ids must fit into 64 bits ({error}): pass longer ones as strings") from error


def _number(group: Hashable) -> int:
    if isinstance(group, str):
        return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") >> 1
    try:
        return operator.index(cast(SupportsIndex, group))
    except TypeError as error:
        raise InputError(f"a group id must be an integer or a string, got {group!r}: one for each sequence") from error
