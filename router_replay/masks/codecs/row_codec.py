"""Codec: packs and reads rows of a geometry, with errors that name tokens and decoder layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from router_replay.errors import InputError, PairingError, UnsupportedError
from router_replay.masks.codecs import reference
from router_replay.masks.codecs.layer_code import LayerCode
from router_replay.masks.codecs.ops import OPS
from router_replay.masks.codecs.registry import CODES
from router_replay.masks.geometry import RoutingGeometry

NO_ROW = 0xFF
"""Byte that fills rows which hold no routes. Unlike zeros, which are the experts 0 to K - 1 to codec 'rank', a row of
these is refused by `check_rows`, except for 'bitset' where K = E, and for the others where all their numbers are
used."""


@dataclass(frozen=True)
class Codec:
    """One way to write a token's routes. Rows have a fixed width, so that they can be sliced, gathered and tabled.

    Shapes: L = `geometry.num_moe_layers`, K = `geometry.top_k`, E = `geometry.num_experts`; any leading shape
    of tokens. `reference` says which bit means what, `torch.ops.routing_masks` does the work.

    Attributes:
        code: how each layer's field is written.
    """

    code: LayerCode

    @property
    def name(self) -> str:
        """One of `CODEC_NAMES`."""
        return self.code.name

    @property
    def keeps_order(self) -> bool:
        """Whether the experts come back in the router's column order, else ascending."""
        return self.code.keeps_order

    def bits_per_layer(self, geometry: RoutingGeometry) -> int:
        """Bits that one layer of one token takes.

        Raises:
            UnsupportedError: this codec cannot write such routes.
        """
        refusal = self.code.refusal(geometry.num_experts, geometry.top_k)
        if refusal is not None:
            raise UnsupportedError(refusal)
        return self.code.bits(geometry.num_experts, geometry.top_k)

    def row_bytes(self, geometry: RoutingGeometry) -> int:
        """Bytes of one token's row: its layers bit-tight, rounded up once."""
        self.bits_per_layer(geometry)
        return reference.row_bytes(self.name, *_arguments(geometry))

    def can_write(self, geometry: RoutingGeometry) -> bool:
        """Whether this codec has a row for every choice of experts of this geometry."""
        return self.code.refusal(geometry.num_experts, geometry.top_k) is None

    def pack(self, indices: Tensor, geometry: RoutingGeometry) -> Tensor:
        """Expert indices `[..., L, K]` (uint8, int16, uint16, int32, int64; any strides) -> `uint8 [..., row_bytes]`.

        On the CPU the values are checked. On a device that would wait for it: indices that are not K different experts
        become fields that `check_rows` refuses wherever the codec has one to spare, and `check_indices` tells.

        Raises:
            PairingError: another L or K than the geometry's.
            InputError: on the CPU, an index outside [0, E) or an expert twice in a layer.
        """
        self.bits_per_layer(geometry)
        _require_shape(indices, geometry)
        try:
            return OPS.pack(indices, geometry.num_experts, self.name)
        except RuntimeError:
            check_indices(indices, geometry)
            raise

    def unpack_indices(
        self, rows: Tensor, geometry: RoutingGeometry, *, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Rows `uint8 [..., row_bytes]` -> expert indices `[..., L, K]`.

        On the CPU the values are checked. On a device a field that is not K different experts reads as K times E.

        Args:
            dtype: of the indices: int16, int32 or int64; by default that of `out`, or else int32.
            out: what to write to and return, contiguous and on the device of the rows; a new tensor by default. It must
                not share memory with `rows`, which are still read while it is written. What it holds after an error is
                not defined.

        Raises:
            PairingError: rows of another width or dtype, an `out` of another shape.
            InputError: on the CPU, bits that `pack` cannot have written; a dtype or an `out` that indices cannot have.
        """
        shape = (*rows.shape[:-1], geometry.num_moe_layers, geometry.top_k)
        return self._unpack(OPS.unpack_indices, OPS.unpack_indices_out, rows, geometry, (), shape, dtype, out)

    def unpack_layer(
        self,
        rows: Tensor,
        geometry: RoutingGeometry,
        layer_index: int,
        *,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """One stored layer of the rows as expert indices `[..., K]`; as `unpack_indices` in all else."""
        shape = (*rows.shape[:-1], geometry.top_k)
        return self._unpack(OPS.unpack_layer, OPS.unpack_layer_out, rows, geometry, (layer_index,), shape, dtype, out)

    def unpack_bitset(self, rows: Tensor, geometry: RoutingGeometry, layer_index: int) -> Tensor:
        """One stored layer of the rows as a mask `bool [..., E]`: the routing map that dispatchers take.

        As `unpack_indices` in all else; a field that is not K different experts is all False.
        """
        return self._checked(OPS.unpack_bitset, rows, geometry, layer_index)

    def unpack_valid(self, rows: Tensor, valid: Tensor, geometry: RoutingGeometry) -> Tensor:
        """Rows `uint8 [T, row_bytes]` -> `int32 [T, L, K]`, -1 where `valid`, `bool [T]`, is False.

        What the bytes of a row that is not valid hold does not matter.
        """
        if bool(valid.all()):
            return self.unpack_indices(rows, geometry)
        shape = (rows.shape[0], geometry.num_moe_layers, geometry.top_k)
        indices = torch.full(shape, -1, dtype=torch.int32, device=rows.device)
        try:
            indices[valid] = self.unpack_indices(rows[valid], geometry)
        except InputError:
            # Names the token by its index among all rows.
            self.check_rows(rows, geometry, valid)
            raise
        return indices

    def require_row_bytes(self, rows: Tensor, geometry: RoutingGeometry) -> None:
        """Raise PairingError unless `rows` is `uint8 [..., row_bytes]` of this codec and geometry."""
        width = self.row_bytes(geometry)
        if rows.dtype != torch.uint8 or rows.dim() == 0 or rows.shape[-1] != width:
            raise PairingError(
                f"rows of {rows.dtype} {tuple(rows.shape)} do not fit: codec {self.name!r} writes uint8 [tokens,"
                f" {width}] for {geometry.num_moe_layers} MoE layers of {geometry.top_k} of {geometry.num_experts}"
                " experts"
            )

    def check_rows(self, rows: Tensor, geometry: RoutingGeometry, valid: Tensor | None = None) -> None:
        """Refuse rows that no `pack` can have written (a corrupted byte, rows of another geometry). Waits for a device.

        Args:
            rows: `uint8 [..., row_bytes]`; `[T, row_bytes]` where `valid` is given.
            valid: `bool [T]`; only the rows where it is True are looked at.

        Raises:
            InputError: naming the first token and decoder layer that are wrong.
        """
        self.require_row_bytes(rows, geometry)
        tokens = None
        if valid is not None and not bool(valid.all()):
            tokens = valid.nonzero().flatten()
            rows = rows[tokens]
        found = _first_illegal(OPS.legal_rows(rows, *_arguments(geometry), self.name))
        if found is None:
            return
        token, layer_index = found
        token = token if tokens is None else int(tokens[token])
        raise InputError(
            f"token {token}, decoder layer {geometry.moe_layers[layer_index]}: the bits are not {geometry.top_k}"
            f" different experts of {geometry.num_experts} as codec {self.name!r} writes them: corrupted rows"
        )

    def _unpack(
        self,
        op: Callable[..., Tensor],
        into: Callable[..., None],
        rows: Tensor,
        geometry: RoutingGeometry,
        layer_index: tuple[int, ...],
        shape: tuple[int, ...],
        dtype: torch.dtype | None,
        out: Tensor | None,
    ) -> Tensor:
        self.require_row_bytes(rows, geometry)
        dtype = _index_dtype(dtype, out)
        if out is None:
            if dtype == torch.int32:
                return self._checked(op, rows, geometry, *layer_index)
            out = torch.empty(shape, dtype=dtype, device=rows.device)
        _require_out(out, shape, rows.device)
        self._checked(lambda *arguments: into(*arguments, out), rows, geometry, *layer_index)
        return out

    def _checked[Result](
        self, op: Callable[..., Result], rows: Tensor, geometry: RoutingGeometry, *layer_index: int
    ) -> Result:
        self.require_row_bytes(rows, geometry)
        try:
            return op(rows, *layer_index, *_arguments(geometry), self.name)
        except RuntimeError:
            self.check_rows(rows, geometry)
            raise


CODEC_NAMES = tuple(CODES)


def get_codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        InputError: no such codec in this version.
    """
    if name not in CODES:
        raise InputError(f"unknown codec {name!r}: this version knows {', '.join(CODES)}")
    return Codec(CODES[name])


def choose_codec(name: str, geometry: RoutingGeometry, *, order: bool = False) -> Codec:
    """The codec of that name, or for 'auto' the one with the smallest rows for this geometry.

    Args:
        order: the router's column order is needed: codecs that do not keep it are left out.

    Raises:
        InputError: no such codec, or one that does not keep the order although it is needed.
        UnsupportedError: a codec that cannot write the routes of this geometry.
    """
    if name == "auto":
        able = [codec for codec in map(Codec, CODES.values()) if codec.can_write(geometry)]
        able = [codec for codec in able if codec.keeps_order or not order]
        return min(able, key=lambda codec: codec.row_bytes(geometry))
    codec = get_codec(name)
    if order and not codec.keeps_order:
        keeping = [other.name for other in CODES.values() if other.keeps_order]
        raise InputError(
            f"codec {name!r} does not keep the top-k column order, which is needed here: choose 'auto' or"
            f" {' or '.join(map(repr, keeping))}"
        )
    codec.bits_per_layer(geometry)
    return codec


def check_indices(indices: Tensor, geometry: RoutingGeometry) -> None:
    """Refuse indices `int [..., L, K]` that are out of range or name an expert twice in a layer. Waits for a device.

    Raises:
        PairingError: another L or K than the geometry's.
        InputError: naming the first token and decoder layer that are wrong.
    """
    _require_shape(indices, geometry)
    illegal = _first_illegal(OPS.legal_indices(indices, geometry.num_experts))
    if illegal is None:
        return
    token, layer_index = illegal
    found = indices.reshape(-1, *indices.shape[-2:])[token, layer_index].tolist()
    outside = any(not 0 <= index < geometry.num_experts for index in found)
    problem = f"are not all in [0, {geometry.num_experts})" if outside else "name an expert twice"
    layer = geometry.moe_layers[layer_index]
    raise InputError(f"token {token}, decoder layer {layer}: expert indices {found} {problem}")


def _first_illegal(legal: Tensor) -> tuple[int, int] | None:
    """Token and layer index of the first False of `bool [..., L]`."""
    if bool(legal.all()):
        return None
    token, layer_index = (~legal.reshape(-1, legal.shape[-1])).nonzero()[0].tolist()
    return token, layer_index


def _index_dtype(dtype: torch.dtype | None, out: Tensor | None) -> torch.dtype:
    """The dtype that indices are asked for in."""
    if out is not None and dtype is not None and out.dtype != dtype:
        raise InputError(f"indices are asked for in {dtype}, but out is {out.dtype}: leave one of the two away")
    chosen = out.dtype if out is not None else dtype or torch.int32
    if chosen not in reference.OUT_DTYPES:
        raise InputError(f"indices are written as torch.int16, torch.int32 or torch.int64, not as {chosen}")
    return chosen


def _require_out(out: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(out.shape) != shape:
        raise PairingError(f"out is {tuple(out.shape)}, but the indices of these rows are {shape}")
    if out.device != device:
        raise InputError(f"out is on {out.device} and the rows on {device}: make it beside them, device=rows.device")
    if not out.is_contiguous():
        raise InputError(
            f"out has strides {out.stride()}, but must be contiguous: give a tensor of its own, and copy from that"
        )


def _require_shape(indices: Tensor, geometry: RoutingGeometry) -> None:
    expected = (geometry.num_moe_layers, geometry.top_k)
    if tuple(indices.shape[-2:]) != expected:
        raise PairingError(
            f"indices of shape {tuple(indices.shape)} do not fit the geometry: expected [tokens, {expected[0]} MoE"
            f" layers, top-k {expected[1]}]"
        )


def _arguments(geometry: RoutingGeometry) -> tuple[int, int, int]:
    return geometry.num_moe_layers, geometry.num_experts, geometry.top_k
