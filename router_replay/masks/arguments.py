"""What callers pass, made what the code expects, or refused with the way out."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from router_replay.errors import InputError


def require_type(name: str, value: Any, expected: type) -> None:
    """Raise InputError unless `value` is of the type `expected`."""
    if not isinstance(value, expected):
        raise InputError(f"{name} is {_described(value)}, but must be a {expected.__name__}")


def as_integer(name: str, value: Any) -> int:
    """An integer of Python, numpy or a tensor's `item()`; no bool and no float."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} is {_described(value)}, but must be an integer") from None


def as_tensor(name: str, value: Any) -> Tensor:
    """A tensor as it is, a numpy array as a tensor that shares its memory where torch can."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(np.require(value, requirements=["C", "W"]))
        except (TypeError, ValueError):
            raise InputError(f"{name} is a numpy array of {value.dtype}, of which torch makes no tensor") from None
    raise InputError(f"{name} is {_described(value)}, but must be a tensor or a numpy array: torch.tensor({name})")


def as_bools(valid: Any) -> Tensor:
    """`valid`, one bool for each token: a mask of floats or integers might be weights or positions, and is refused."""
    if isinstance(valid, np.ndarray):
        valid = as_tensor("valid", valid)
    if isinstance(valid, Tensor) and valid.dtype == torch.bool:
        return valid
    found = f"{valid.dtype} {list(valid.shape)}" if isinstance(valid, Tensor) else _described(valid)
    way_out = "valid.bool()" if isinstance(valid, Tensor) else "torch.tensor(valid, dtype=torch.bool)"
    raise InputError(
        f"valid is {found}, but must be torch.bool [tokens], True where the row was recorded: {way_out}, if that is"
        " what it means"
    )


def _described(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__} ({str(value)[:40]})"
