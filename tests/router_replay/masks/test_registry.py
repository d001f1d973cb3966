"""A codec is its file and a line of a list: one that is forgotten somewhere is an error and never another codec."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from router_replay.errors import InputError, UnsupportedError
from router_replay.masks import CODEC_NAMES, RoutingGeometry, choose_codec, get_codec
from router_replay.masks.codecs import reference
from router_replay.masks.codecs.ops import OPS
from router_replay.masks.codecs.registry import CODES
from tests.router_replay.masks.hypothetical import BytesCode
from tests.router_replay.masks.routes import random_indices
from tests.router_replay.masks.test_ops import OP_NAMES

GEOMETRY = RoutingGeometry(9, (1, 4, 7), 300, 4)
ARGUMENTS = (3, 300, 4, "bytes")


@pytest.fixture
def indices(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Indices for `GEOMETRY`, `int64 [5, 3, 4]`, while there is a fourth codec."""
    monkeypatch.setitem(CODES, "bytes", BytesCode())
    return random_indices(GEOMETRY, 5, seed=0)


def test_the_three_codecs_by_their_names() -> None:
    assert CODEC_NAMES == ("bitset", "rank", "ordered")
    assert [code.name for code in CODES.values()] == list(CODES)


def test_a_registered_codec_is_written_and_read_in_plain_torch(indices: Tensor) -> None:
    rows = reference.pack(indices, 300, "bytes")
    assert torch.equal(rows.view(torch.int16), indices.flatten(1).to(torch.int16))
    assert torch.equal(reference.unpack_indices(rows, *ARGUMENTS), indices.int())
    assert torch.equal(reference.unpack_layer(rows, 2, *ARGUMENTS), indices[:, 2].int())
    mask = torch.zeros(5, 300, dtype=torch.bool).scatter_(-1, indices[:, 1], True)
    assert torch.equal(reference.unpack_bitset(rows, 1, *ARGUMENTS), mask)
    rows[3, 1 * 8 + 1] = 255
    assert (~reference.legal_rows(rows, *ARGUMENTS)).nonzero().tolist() == [[3, 1]]


def test_a_registered_codec_is_one_of_those_to_choose_from(indices: Tensor) -> None:
    codec = get_codec("bytes")
    assert (codec.name, codec.keeps_order) == ("bytes", True)
    assert codec.row_bytes(GEOMETRY) == 3 * 4 * 2
    assert choose_codec("bytes", GEOMETRY, order=True) == codec
    with pytest.raises(InputError, match=r"'bitset' does not keep .*'ordered' or 'bytes'"):
        choose_codec("bitset", GEOMETRY, order=True)
    with pytest.raises(UnsupportedError, match="codec 'bytes' is for more than one expert"):
        choose_codec("bytes", RoutingGeometry(1, (0,), 1, 1))
    with pytest.raises(RuntimeError, match="codec 'bytes' is for more than one expert"):
        reference.pack(torch.zeros(2, 1, 1, dtype=torch.int32), 1, "bytes")


@pytest.mark.parametrize("op", [name for name in OP_NAMES if name != "legal_indices"])
def test_kernels_without_the_codec_refuse_it_by_name(indices: Tensor, op: str) -> None:
    rows = reference.pack(indices, 300, "bytes")
    arguments = {"pack": (indices, 300, "bytes")}.get(op, (rows, *ARGUMENTS))
    if op in ("unpack_layer", "unpack_layer_out", "unpack_bitset"):
        arguments = (rows, 1, *ARGUMENTS)
    if op == "take_rows":
        arguments = (indices.short(), 0, 2, 2, 300, 4, "bytes")
    if op == "unpack_indices_out":
        arguments = (*arguments, torch.empty_like(indices))
    if op == "unpack_layer_out":
        arguments = (*arguments, torch.empty_like(indices[:, 1]))
    with pytest.raises(RuntimeError, match="unknown codec 'bytes': the kernels know bitset, rank, ordered"):
        getattr(OPS, op)(*arguments)


@pytest.mark.parametrize("name", ["zip", "bytes", "Rank", ""])
def test_what_is_not_registered_is_refused_with_those_known(name: str) -> None:
    rows = torch.zeros(5, 24, dtype=torch.uint8)
    known = "bitset, rank, ordered"
    with pytest.raises(InputError, match=f"unknown codec '{name}': this version knows {known}"):
        get_codec(name)
    with pytest.raises(RuntimeError, match=f"unknown codec '{name}': the reference knows {known}"):
        reference.pack(torch.zeros(5, 3, 1, dtype=torch.int32), 300, name)
    with pytest.raises(RuntimeError, match=f"unknown codec '{name}': the reference knows {known}"):
        reference.legal_rows(rows, 3, 300, 4, name)
