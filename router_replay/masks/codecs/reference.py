"""Codecs in plain torch: the meaning of a packed row, and what runs where the kernels cannot be loaded.

A row holds one token's routes: the MoE layers one after the other, each in a field of fixed width, bit-tight, least
significant bit first within a byte, the last byte filled up with zeros. `registry` has the codes of the fields.

Indices that are not K different experts become a field that is illegal wherever the codec has one to spare: all of its
bits are the code's `illegal_bit`. An illegal field reads back as K times the index E, which is no expert.
On the CPU either is refused; on other devices that would wait for the device, and the functions legal_* tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from router_replay.masks.codecs.bits import bits_of_bytes, bytes_of_bits
from router_replay.masks.codecs.layer_code import LayerCode, are_different_experts
from router_replay.masks.codecs.registry import CODES
from router_replay.masks.limits import MAX_EXPERTS, MAX_TOP_K

# Elements of the largest intermediate tensor: bounds the working memory to some tens of megabytes.
_ELEMENTS_AT_ONCE = 1 << 21
UNWRITTEN = -1
"""What a staging buffer holds where no MoE layer wrote."""
OUT_DTYPES = (torch.int16, torch.int32, torch.int64)
INDEX_DTYPES = (torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64)


def bits_per_layer(codec: str, num_experts: int, top_k: int) -> int:
    """Bits of one layer's field, also of fields that the codec cannot write."""
    if codec not in CODES:
        raise RuntimeError(f"unknown codec {codec!r}: the reference knows {', '.join(CODES)}")
    return CODES[codec].bits(num_experts, top_k)


def row_bytes(codec: str, num_layers: int, num_experts: int, top_k: int) -> int:
    """Bytes of one token's row: its layers bit-tight, rounded up once."""
    return (num_layers * bits_per_layer(codec, num_experts, top_k) + 7) // 8


def pack(indices: Tensor, num_experts: int, codec: str) -> Tensor:
    """Expert indices `int [..., L, K]` -> rows `uint8 [..., row_bytes]`."""
    _require_indices(indices, num_experts)
    *leading, num_layers, top_k = indices.shape
    _code_and_width(codec, num_experts, top_k)
    flat = indices.reshape(math.prod(leading), num_layers, top_k).long()
    if indices.device.type == "cpu":
        problem = f"the indices are not {top_k} different experts in [0, {num_experts})"
        _refuse(are_different_experts(flat, num_experts), 0, problem)
    rows = _packed(flat, num_experts, codec)
    return rows.reshape(*leading, rows.shape[1])


def take_rows(
    staging: Tensor, first: int, last: int, end: int, num_experts: int, top_k: int, codec: str
) -> tuple[Tensor, Tensor]:
    """Rows of the tokens [first, last) of a pass, and set its staging buffer back to `UNWRITTEN`, all of it.

    Illegal indices are no error here on any device: they are what a layer leaves that reported nothing.

    Args:
        staging: contiguous `int16 [max_tokens, L, columns]`, the first K columns routed experts.
        end: number of rows that the pass is known to have written, or at least `max_tokens`. Where it wrote more, the
            rows are not laid out as the caller thinks, and none is valid.

    Returns:
        `(rows uint8 [n, row_bytes], valid bool [n])`; valid: each of the token's layers has K different experts.
    """
    if staging.dtype != torch.int16 or staging.dim() != 3 or not staging.is_contiguous():
        raise RuntimeError(
            f"staging is {staging.dtype} {tuple(staging.shape)}, but must be contiguous int16 [tokens, MoE layers,"
            " top-k or more]"
        )
    if not 0 <= first <= last <= len(staging) or end < 0:
        raise RuntimeError(f"tokens [{first}, {last}) of a pass of {end} are not in a staging buffer of {len(staging)}")
    if staging.shape[2] < top_k:
        raise RuntimeError(f"staging has {staging.shape[2]} columns, but top-k is {top_k}")
    taken = staging[first:last, :, :top_k].long()
    _require_indices(taken, num_experts)
    _code_and_width(codec, num_experts, top_k)
    valid = are_different_experts(taken, num_experts).all(-1)
    if end < len(staging):
        valid &= (staging[end] == UNWRITTEN).all()
    rows = _packed(taken, num_experts, codec)
    staging.fill_(UNWRITTEN)
    return rows, valid


def unpack_indices(rows: Tensor, num_layers: int, num_experts: int, top_k: int, codec: str) -> Tensor:
    """Rows `uint8 [..., row_bytes]` -> expert indices `int32 [..., L, K]`, ascending where the order is not kept."""
    indices = _unpack(rows, 0, num_layers, num_layers, num_experts, top_k, codec)
    return indices.reshape(*rows.shape[:-1], num_layers, top_k)


def unpack_layer(rows: Tensor, layer_index: int, num_layers: int, num_experts: int, top_k: int, codec: str) -> Tensor:
    """One layer of the rows as expert indices `int32 [..., K]`."""
    if not 0 <= layer_index < num_layers:
        raise RuntimeError(f"layer_index {layer_index} is none of the {num_layers} MoE layers")
    indices = _unpack(rows, layer_index, layer_index + 1, num_layers, num_experts, top_k, codec)
    return indices.reshape(*rows.shape[:-1], top_k)


def unpack_indices_out(rows: Tensor, num_layers: int, num_experts: int, top_k: int, codec: str, out: Tensor) -> None:
    """As `unpack_indices`, into contiguous `out` `[..., L, K]` of int16, int32 or int64."""
    _require_out(out, rows, (num_layers, top_k))
    out.copy_(unpack_indices(rows, num_layers, num_experts, top_k, codec))


def unpack_layer_out(
    rows: Tensor, layer_index: int, num_layers: int, num_experts: int, top_k: int, codec: str, out: Tensor
) -> None:
    """As `unpack_layer`, into contiguous `out` `[..., K]` of int16, int32 or int64."""
    _require_out(out, rows, (top_k,))
    out.copy_(unpack_layer(rows, layer_index, num_layers, num_experts, top_k, codec))


def unpack_bitset(rows: Tensor, layer_index: int, num_layers: int, num_experts: int, top_k: int, codec: str) -> Tensor:
    """One layer of the rows as a mask `bool [..., E]`; all False where the field is illegal."""
    indices = unpack_layer(rows, layer_index, num_layers, num_experts, top_k, codec)
    # One place more than there are experts, for what is none.
    mask = torch.zeros((*rows.shape[:-1], num_experts + 1), dtype=torch.bool, device=rows.device)
    return mask.scatter_(-1, indices.long(), True)[..., :num_experts].contiguous()


def legal_indices(indices: Tensor, num_experts: int) -> Tensor:
    """Whether indices `int [..., L, K]` are K different experts: `bool [..., L]`."""
    _require_indices(indices, num_experts)
    return are_different_experts(indices.long(), num_experts)


def legal_rows(rows: Tensor, num_layers: int, num_experts: int, top_k: int, codec: str) -> Tensor:
    """Whether `pack` can have written the fields of rows `uint8 [..., row_bytes]`: `bool [..., L]`.

    The bits behind a row's last field, which are zeros, count as that field's.
    """
    flat = _flat_rows(rows, num_layers, num_experts, top_k, codec)
    _, legal = _decoded(flat, 0, num_layers, num_layers, num_experts, top_k, codec)
    return legal.reshape(*rows.shape[:-1], num_layers)


def _unpack(rows: Tensor, first: int, end: int, num_layers: int, num_experts: int, top_k: int, codec: str) -> Tensor:
    flat = _flat_rows(rows, num_layers, num_experts, top_k, codec)
    indices, legal = _decoded(flat, first, end, num_layers, num_experts, top_k, codec)
    if rows.device.type == "cpu":
        _refuse(legal, first, f"these bits are not {top_k} different experts of {num_experts}: corrupted rows")
    return indices


def _packed(flat: Tensor, num_experts: int, codec: str) -> Tensor:
    """Rows `uint8 [T, row_bytes]` of `int64 [T, L, K]`, of which the illegal become illegal fields."""
    _, num_layers, top_k = flat.shape
    code, width = _code_and_width(codec, num_experts, top_k)
    num_bytes = row_bytes(codec, num_layers, num_experts, top_k)
    rows = torch.empty((flat.shape[0], num_bytes), dtype=torch.uint8, device=flat.device)
    for part in _parts(flat.shape[0], num_layers * max(num_experts, width)):
        rows[part] = bytes_of_bits(_encode(flat[part], num_experts, code).flatten(1), num_bytes)
    return rows


def _decoded(
    flat: Tensor, first: int, end: int, num_layers: int, num_experts: int, top_k: int, codec: str
) -> tuple[Tensor, Tensor]:
    """Layers [first, end) of rows `uint8 [T, row_bytes]`: `(indices int32 [T, layers, K], legal bool [T, layers])`."""
    code, width = _code_and_width(codec, num_experts, top_k)
    indices = torch.empty((flat.shape[0], end - first, top_k), dtype=torch.int32, device=flat.device)
    legal = torch.empty(indices.shape[:2], dtype=torch.bool, device=flat.device)
    for part in _parts(flat.shape[0], num_layers * max(num_experts, width)):
        bits = bits_of_bytes(flat[part])
        fields = bits[:, first * width : end * width].reshape(len(bits), end - first, width)
        indices[part] = _decode(fields, num_experts, top_k, code)
        legal[part] = are_different_experts(indices[part].long(), num_experts)
        if end == num_layers:
            legal[part, -1] &= ~bits[:, num_layers * width :].any(-1)
    return indices, legal


def _code_and_width(codec: str, num_experts: int, top_k: int) -> tuple[LayerCode, int]:
    width = bits_per_layer(codec, num_experts, top_k)
    code = CODES[codec]
    if (refusal := code.refusal(num_experts, top_k)) is not None:
        raise RuntimeError(refusal)
    return code, width


def _encode(indices: Tensor, num_experts: int, code: LayerCode) -> Tensor:
    """Indices `int64 [T, L, K]` -> fields `bool [T, L, width]`."""
    legal = are_different_experts(indices, num_experts)[..., None]
    indices = torch.where(legal, indices, torch.arange(indices.shape[-1], device=indices.device))
    return torch.where(legal, code.encode(indices, num_experts), code.illegal_bit)


def _decode(fields: Tensor, num_experts: int, top_k: int, code: LayerCode) -> Tensor:
    """Fields `bool [T, L, width]` -> indices `int32 [T, L, K]`."""
    indices, legal = code.decode(fields, num_experts, top_k)
    return torch.where(legal[..., None], indices, num_experts).int()


def _refuse(legal: Tensor, first_layer: int, problem: str) -> None:
    if not bool(legal.all()):
        token, layer = (~legal).nonzero()[0].tolist()
        raise RuntimeError(f"token {token}, MoE layer {first_layer + layer}: {problem}")


def _require_geometry(num_layers: int, num_experts: int, top_k: int) -> None:
    if num_layers < 1 or not 1 <= num_experts <= MAX_EXPERTS or not 1 <= top_k <= min(num_experts, MAX_TOP_K):
        raise RuntimeError(
            f"{num_layers} MoE layers of top-k {top_k} of {num_experts} experts: there must be a layer, up to"
            f" {MAX_EXPERTS} experts and top-k {MAX_TOP_K}, and no more chosen than there are"
        )


def _require_indices(indices: Tensor, num_experts: int) -> None:
    if indices.dtype not in INDEX_DTYPES or indices.dim() < 2:
        raise RuntimeError(
            f"indices are {indices.dtype} {tuple(indices.shape)}, but must be uint8, int16, uint16, int32 or int64,"
            " [..., MoE layers, top-k]"
        )
    _require_geometry(indices.shape[-2], num_experts, indices.shape[-1])


def _require_out(out: Tensor, rows: Tensor, last: tuple[int, ...]) -> None:
    expected = (*rows.shape[:-1], *last)
    if tuple(out.shape) != expected:
        raise RuntimeError(f"out has another shape than the indices of these rows: {tuple(out.shape)}, not {expected}")
    if out.dtype not in OUT_DTYPES:
        raise RuntimeError(f"out must be int16, int32 or int64, and is {out.dtype}")
    if out.device != rows.device:
        raise RuntimeError(f"out is not on the rows' device: {out.device}, not {rows.device}")
    if not out.is_contiguous():
        raise RuntimeError("out must be contiguous")


def _flat_rows(rows: Tensor, num_layers: int, num_experts: int, top_k: int, codec: str) -> Tensor:
    _require_geometry(num_layers, num_experts, top_k)
    expected = row_bytes(codec, num_layers, num_experts, top_k)
    if rows.dtype != torch.uint8 or rows.dim() == 0 or rows.shape[-1] != expected:
        raise RuntimeError(f"rows are {rows.dtype} {tuple(rows.shape)}, but must be uint8 [..., {expected}]")
    return rows.reshape(math.prod(rows.shape[:-1]), expected)


def _parts(num_rows: int, elements_per_row: int) -> Iterator[slice]:
    step = max(1, _ELEMENTS_AT_ONCE // elements_per_row)
    return (slice(first, first + step) for first in range(0, num_rows, step))
