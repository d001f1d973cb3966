"""Codecs in plain torch: the meaning of a packed row.

A row holds one token's routes: the MoE layers one after the other, each in a field of fixed width, bit-tight, least
significant bit first within a byte, the last byte filled up with zeros. Nothing here reads a value back to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that are expanded to one byte per bit at a time: bounds the working memory to some tens of megabytes.
_ROWS_AT_ONCE = 4096


def pack_bits(bits: Tensor) -> Tensor:
    """Bits `bool [T, n]` -> bytes `uint8 [T, ceil(n / 8)]`, bit i of a row in byte i // 8 at place i % 8."""
    num_rows, num_bits = bits.shape
    num_bytes = (num_bits + 7) // 8
    packed = torch.empty((num_rows, num_bytes), dtype=torch.uint8, device=bits.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    places = torch.ones_like(shifts) << shifts
    for first in range(0, num_rows, _ROWS_AT_ONCE):
        part = bits[first : first + _ROWS_AT_ONCE]
        full = part.new_zeros((part.shape[0], num_bytes * 8))
        full[:, :num_bits] = part
        packed[first : first + _ROWS_AT_ONCE] = (full.view(len(part), num_bytes, 8) * places).sum(-1, dtype=torch.uint8)
    return packed


def unpack_bits(packed: Tensor, first_bit: int, num_bits: int) -> Tensor:
    """Bits [first_bit, first_bit + num_bits) of every row of `uint8 [T, B]`, as `bool [T, num_bits]`."""
    lo, hi = first_bit // 8, (first_bit + num_bits + 7) // 8
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = ((packed[:, lo:hi, None] >> shifts) & 1).bool().flatten(1)
    skip = first_bit - lo * 8
    return bits[:, skip : skip + num_bits]


def pack_bitset(indices: Tensor, num_experts: int) -> Tensor:
    """Expert indices `int [T, L, K]` -> rows of `num_experts` bits per layer, expert e at bit e."""
    return pack_bits(indices_to_mask(indices, num_experts).flatten(1))


def unpack_bitset_layer(rows: Tensor, num_experts: int, slot: int) -> Tensor:
    """One layer of rows made by `pack_bitset`, as `bool [T, num_experts]`."""
    return unpack_bits(rows, slot * num_experts, num_experts)


def pack_ordered(indices: Tensor, bits_per_index: int) -> Tensor:
    """Expert indices `int [T, L, K]` -> rows of K indices of `bits_per_index` bits per layer, column order kept."""
    shifts = torch.arange(bits_per_index, dtype=torch.int32, device=indices.device)
    bits = ((indices.to(torch.int32)[..., None] >> shifts) & 1).bool()
    return pack_bits(bits.flatten(1))


def unpack_ordered_layer(rows: Tensor, top_k: int, bits_per_index: int, slot: int) -> Tensor:
    """One layer of rows made by `pack_ordered`, as `int32 [T, top_k]`."""
    width = top_k * bits_per_index
    bits = unpack_bits(rows, slot * width, width).view(rows.shape[0], top_k, bits_per_index)
    shifts = torch.arange(bits_per_index, dtype=torch.int32, device=rows.device)
    return (bits.to(torch.int32) << shifts).sum(-1, dtype=torch.int32)


def indices_to_mask(indices: Tensor, num_experts: int) -> Tensor:
    """Expert indices `int [..., K]` -> mask `bool [..., num_experts]`."""
    mask = torch.zeros((*indices.shape[:-1], num_experts), dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, indices.long(), True)


def mask_to_indices(mask: Tensor, top_k: int) -> Tensor:
    """Mask `bool [..., E]` with `top_k` bits set -> indices `int32 [..., top_k]`, ascending; E where a bit lacks."""
    num_experts = mask.shape[-1]
    experts = torch.arange(num_experts, dtype=torch.int32, device=mask.device)
    return torch.where(mask, experts, num_experts).sort(dim=-1).values[..., :top_k].contiguous()
