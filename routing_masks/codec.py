"""Codecs: how the expert ids of one token become a row of fixed width, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from routing_masks import reference
from routing_masks.errors import GeometryMismatchError, MaskValueError, RoutingMaskError
from routing_masks.geometry import RoutingGeometry


class Codec(ABC):
    """One way to write a token's routes. Rows have a fixed width, so that they can be sliced, gathered and tabled.

    Shapes: T tokens, L = `geometry.num_moe_layers`, K = `geometry.top_k`, E = `geometry.num_experts`.
    """

    name: str
    keeps_order: bool

    @abstractmethod
    def bits_per_layer(self, geometry: RoutingGeometry) -> int:
        """Bits that one layer of one token takes."""

    def row_bytes(self, geometry: RoutingGeometry) -> int:
        """Bytes of one token's row: its layers bit-tight, rounded up once."""
        return (geometry.num_moe_layers * self.bits_per_layer(geometry) + 7) // 8

    def pack(self, indices: Tensor, geometry: RoutingGeometry) -> Tensor:
        """Expert indices `int [T, L, K]` of any integer dtype and strides -> rows `uint8 [T, row_bytes]`.

        On the CPU the values are checked; on other devices that would wait for the device, so the caller vouches.

        Raises:
            GeometryMismatchError: another L or K than the geometry's.
            MaskValueError: on the CPU, an index outside [0, E) or an expert twice in a row.
        """
        expected = (geometry.num_moe_layers, geometry.top_k)
        if indices.dim() != 3 or tuple(indices.shape[1:]) != expected:
            raise GeometryMismatchError(
                f"indices of shape {tuple(indices.shape)} do not fit the geometry: expected [tokens, {expected[0]} MoE"
                f" layers, top-k {expected[1]}]"
            )
        if indices.device.type == "cpu":
            check_indices(indices, geometry)
        return self.pack_unchecked(indices, geometry)

    @abstractmethod
    def pack_unchecked(self, indices: Tensor, geometry: RoutingGeometry) -> Tensor:
        """`pack` without looking at shape and values: no host sync on any device, undefined rows for illegal input."""

    @abstractmethod
    def unpack_layer(self, rows: Tensor, geometry: RoutingGeometry, slot: int) -> Tensor:
        """One stored layer of the rows as expert indices `int32 [T, K]`; ascending if order is not kept."""

    @abstractmethod
    def mask_layer(self, rows: Tensor, geometry: RoutingGeometry, slot: int) -> Tensor:
        """One stored layer of the rows as a mask `bool [T, E]`: the routing map that dispatchers take."""

    def unpack_indices(self, rows: Tensor, geometry: RoutingGeometry) -> Tensor:
        """Rows `uint8 [T, row_bytes]` -> expert indices `int32 [T, L, K]`."""
        self.require_row_bytes(rows, geometry)
        return torch.stack([self.unpack_layer(rows, geometry, slot) for slot in range(geometry.num_moe_layers)], dim=1)

    def unpack_bitset(self, rows: Tensor, geometry: RoutingGeometry) -> Tensor:
        """Rows `uint8 [T, row_bytes]` -> masks `bool [T, L, E]`."""
        self.require_row_bytes(rows, geometry)
        return torch.stack([self.mask_layer(rows, geometry, slot) for slot in range(geometry.num_moe_layers)], dim=1)

    def require_row_bytes(self, rows: Tensor, geometry: RoutingGeometry) -> None:
        """Raise GeometryMismatchError unless `rows` is `uint8 [T, row_bytes]` of this codec and geometry."""
        width = self.row_bytes(geometry)
        if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != width:
            raise GeometryMismatchError(
                f"rows of {rows.dtype} {tuple(rows.shape)} do not fit: codec {self.name!r} writes uint8 [tokens,"
                f" {width}] for {geometry.num_moe_layers} MoE layers of {geometry.top_k} of {geometry.num_experts}"
                " experts"
            )

    def check_rows(self, rows: Tensor, geometry: RoutingGeometry) -> None:
        """Refuse rows that no `pack` can have written (a corrupted byte, rows of another geometry). Reads values back.

        Raises:
            MaskValueError: naming the first token and decoder layer that are wrong.
        """
        indices = self.unpack_indices(rows, geometry)
        check_indices(indices, geometry)
        different = (self.pack_unchecked(indices, geometry) != rows).any(-1)
        if different.any():
            token = int(different.nonzero()[0])
            raise MaskValueError(
                f"row of token {token} has bits set beyond its top-k or its last layer: corrupted rows"
            )


class BitsetCodec(Codec):
    """E bits per layer, expert e at bit e: the mask itself."""

    name = "bitset"
    keeps_order = False

    def bits_per_layer(self, geometry: RoutingGeometry) -> int:
        return geometry.num_experts

    def pack_unchecked(self, indices: Tensor, geometry: RoutingGeometry) -> Tensor:
        return reference.pack_bitset(indices, geometry.num_experts)

    def unpack_layer(self, rows: Tensor, geometry: RoutingGeometry, slot: int) -> Tensor:
        return reference.mask_to_indices(self.mask_layer(rows, geometry, slot), geometry.top_k)

    def mask_layer(self, rows: Tensor, geometry: RoutingGeometry, slot: int) -> Tensor:
        return reference.unpack_bitset_layer(rows, geometry.num_experts, slot)


class OrderedCodec(Codec):
    """K * ceil(log2 E) bits per layer: the indices in the router's own column order."""

    name = "ordered"
    keeps_order = True

    def bits_per_layer(self, geometry: RoutingGeometry) -> int:
        return geometry.top_k * self._bits_per_index(geometry)

    def _bits_per_index(self, geometry: RoutingGeometry) -> int:
        return (geometry.num_experts - 1).bit_length()

    def pack_unchecked(self, indices: Tensor, geometry: RoutingGeometry) -> Tensor:
        return reference.pack_ordered(indices, self._bits_per_index(geometry))

    def unpack_layer(self, rows: Tensor, geometry: RoutingGeometry, slot: int) -> Tensor:
        return reference.unpack_ordered_layer(rows, geometry.top_k, self._bits_per_index(geometry), slot)

    def mask_layer(self, rows: Tensor, geometry: RoutingGeometry, slot: int) -> Tensor:
        return reference.indices_to_mask(self.unpack_layer(rows, geometry, slot), geometry.num_experts)


_CODECS: dict[str, Codec] = {codec.name: codec for codec in (BitsetCodec(), OrderedCodec())}
CODEC_NAMES = tuple(_CODECS)


def get_codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        RoutingMaskError: no such codec in this version.
    """
    try:
        return _CODECS[name]
    except KeyError:
        raise RoutingMaskError(f"unknown codec {name!r}: this version knows {', '.join(CODEC_NAMES)}") from None


def choose_codec(name: str, geometry: RoutingGeometry) -> Codec:
    """The codec of that name, or for 'auto' the one with the smallest rows for this geometry."""
    if name != "auto":
        return get_codec(name)
    return min(_CODECS.values(), key=lambda codec: codec.row_bytes(geometry))


def check_indices(indices: Tensor, geometry: RoutingGeometry) -> None:
    """Refuse indices `int [T, L, K]` that are out of range or name an expert twice in a row. Reads values back.

    Raises:
        MaskValueError: naming the first token and decoder layer that are wrong.
    """
    if indices.dtype not in _COMPARABLE:
        indices = indices.to(torch.int64)
    outside = ((indices < 0) | (indices >= geometry.num_experts)).any(-1)
    if outside.any():
        token, slot = outside.nonzero()[0].tolist()
        raise MaskValueError(
            f"token {token}, decoder layer {geometry.moe_layers[slot]}: expert indices {indices[token, slot].tolist()}"
            f" are not all in [0, {geometry.num_experts})"
        )
    ordered = indices.sort(-1).values
    repeated = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
    if repeated.any():
        token, slot = repeated.nonzero()[0].tolist()
        raise MaskValueError(
            f"token {token}, decoder layer {geometry.moe_layers[slot]}: expert indices {indices[token, slot].tolist()}"
            " name an expert twice"
        )


# Others either wrap a number of experts above their range when compared with it (uint8), or cannot be sorted (uint16).
_COMPARABLE = (torch.int16, torch.int32, torch.int64)
