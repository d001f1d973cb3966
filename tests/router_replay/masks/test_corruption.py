"""Rows that no router can have produced are found wherever the codec has bits to spare."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router_replay.errors import InputError
from router_replay.masks import CODEC_NAMES, NO_ROW, RoutingGeometry, get_codec
from router_replay.masks.codecs import reference
from router_replay.masks.codecs.registry import CODES
from tests.router_replay.masks.routes import coded_geometries, geometries, legal_row, random_indices, seeds


def _refused(name: str, rows: torch.Tensor, geometry: RoutingGeometry) -> bool:
    try:
        get_codec(name).check_rows(rows, geometry)
    except InputError:
        return True
    return False


@given(geometries(max_experts=40, max_layers=4), seeds)
@settings(max_examples=25, deadline=None)
def test_every_flipped_bit_of_a_bitset_is_found(geometry, seed):
    codec = get_codec("bitset")
    row = codec.pack(random_indices(geometry, 1, seed), geometry)
    for bit in range(row.shape[1] * 8):
        flipped = row.clone()
        flipped[0, bit // 8] ^= 1 << bit % 8
        assert _refused("bitset", flipped, geometry)


@given(coded_geometries(max_experts=40, max_layers=4), seeds, st.data())
@settings(max_examples=120, deadline=None)
def test_exactly_the_legal_rows_pass(coded, seed, data):
    """Legal as the row's definition in Python integers says, for rows with a few flipped bits and for random bytes."""
    geometry, name = coded
    codec = get_codec(name)
    row = codec.pack(random_indices(geometry, 1, seed), geometry)
    width = row.shape[1]
    if data.draw(st.booleans()) and width:
        for bit in data.draw(st.lists(st.integers(0, width * 8 - 1), max_size=4, unique=True)):
            row[0, bit // 8] ^= 1 << bit % 8
    else:
        row = torch.tensor([list(data.draw(st.binary(min_size=width, max_size=width)))], dtype=torch.uint8)
    assert _refused(name, row, geometry) == (not legal_row(name, bytes(row[0].tolist()), geometry))


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_a_padding_bit_is_found_and_its_token_named(name):
    geometry = RoutingGeometry(3, (0, 1, 2), 6, 1)
    rows = get_codec(name).pack(random_indices(geometry, 4, seed=0), geometry)
    rows[2, -1] |= 128
    with pytest.raises(InputError, match="token 2"):
        get_codec(name).check_rows(rows, geometry)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_what_fills_missing_rows_is_found_and_located(name):
    """A missing row is marked as such; should the mark be lost, what fills it is no legal row."""
    geometry = RoutingGeometry(9, (2, 5), 32, 4)
    rows = get_codec(name).pack(random_indices(geometry, 4, seed=1), geometry)
    rows[3] = NO_ROW
    with pytest.raises(InputError, match="token 3, decoder layer 2"):
        get_codec(name).check_rows(rows, geometry)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_a_corrupted_row_is_located_among_all_rows_and_not_among_the_valid_ones(name):
    geometry = RoutingGeometry(9, (2, 5), 33, 4)
    codec = get_codec(name)
    rows = codec.pack(random_indices(geometry, 5, seed=1), geometry)
    valid = torch.tensor([False, False, True, True, True])
    rows[0] = rows[3] = NO_ROW
    for refuse in (codec.unpack_valid, lambda rows, valid, geometry: codec.check_rows(rows, geometry, valid)):
        with pytest.raises(InputError, match="token 3, decoder layer 2"):
            refuse(rows, valid, geometry)


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize(("num_experts", "top_k"), [(60, 1), (60, 4), (64, 2), (128, 8), (24, 23)])
@pytest.mark.parametrize("wrong", [-1, 200, "twice"])
def test_illegal_indices_become_a_field_that_is_found(name, num_experts, top_k, wrong):
    """Where a device is not waited for, the field is the only trace that illegal indices leave."""
    if wrong == "twice" and top_k == 1:
        return
    indices = random_indices(RoutingGeometry(1, (0,), num_experts, top_k), 3, seed=0)
    indices[1, 0, 0] = indices[1, 0, 1] if wrong == "twice" else wrong
    code = CODES[name]
    field = reference._encode(indices, num_experts, code)
    assert field.shape == (3, 1, code.bits(num_experts, top_k))
    assert reference._decode(field, num_experts, top_k, code)[1].tolist() == [[num_experts] * top_k]


def test_an_expert_missing_from_a_bitset_is_located():
    geometry = RoutingGeometry(9, (2, 5), 32, 4)
    indices = random_indices(geometry, 4, seed=2)
    rows = get_codec("bitset").pack(indices, geometry)
    expert = int(indices[1, 1, 0])
    rows[1, 4 + expert // 8] ^= 1 << expert % 8
    with pytest.raises(InputError, match="token 1, decoder layer 5"):
        get_codec("bitset").check_rows(rows, geometry)
