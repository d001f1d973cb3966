"""Bits as bool tensors, least significant first, and what they make up."""

from __future__ import annotations

import torch
from torch import Tensor


def bytes_of_bits(bits: Tensor, num_bytes: int) -> Tensor:
    """Bits `bool [T, n]` -> `uint8 [T, num_bytes]`, bit i of a row in byte i // 8 at place i % 8."""
    full = bits.new_zeros((bits.shape[0], num_bytes * 8))
    full[:, : bits.shape[1]] = bits
    places = torch.tensor([1 << place for place in range(8)], dtype=torch.uint8, device=bits.device)
    return (full.unflatten(1, (num_bytes, 8)) * places).sum(-1, dtype=torch.uint8)


def bits_of_bytes(rows: Tensor) -> Tensor:
    """Bytes `uint8 [T, B]` -> bits `bool [T, 8 B]`."""
    return ((rows[..., None] >> torch.arange(8, dtype=torch.uint8, device=rows.device)) & 1).bool().flatten(1)


def bits_of_integers(integers: Tensor, width: int) -> Tensor:
    """Integers `int64 [...]` -> their lowest bits `bool [..., width]`."""
    return ((integers[..., None] >> torch.arange(width, device=integers.device)) & 1).bool()


def integers_of_bits(bits: Tensor) -> Tensor:
    """Bits `bool [..., width]` -> integers `int64 [...]`."""
    return (bits.long() << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)
